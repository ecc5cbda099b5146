"""Text features: the prompt of each category, encoded by a text encoder."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import DataError, optional_import
from .sets import SEGMENTS, ReleasedSet, in_all_segments


@torch.no_grad()
def with_text(released: ReleasedSet, encoder: str) -> ReleasedSet:
    """Add the modality "text": every clip has the prompt of its category.

    The features are those of the first 10 tokens, padded with zeros as in the release (whose tokens
    are whole words of a fixed vocabulary). The event of text is the category, in every segment.

    Args:
        released: A set with prompts.
        encoder: Name or folder of a Hugging Face BERT; the release uses bert-base-uncased.

    Raises:
        DataError: transformers is not installed, the encoder cannot be loaded, or a category has no
            prompt.
    """
    with optional_import("text", "pip install transformers"):
        from transformers import AutoModel, AutoTokenizer
    try:
        tokenizer, model = (x.from_pretrained(encoder) for x in (AutoTokenizer, AutoModel))
    except Exception as error:  # damaged files raise many types
        first = str(error).partition("\n")[0]
        raise DataError(f"--text-encoder {encoder}: cannot be loaded ({first}).") from error
    K = len(released.categories)
    sentences = torch.zeros(K, SEGMENTS, model.config.hidden_size)
    for k, category in enumerate(released.categories):
        if category not in released.prompts:
            raise DataError(f"text: category '{category}' has no prompt in the table of prompts.")
        tokens = tokenizer(released.prompts[category], return_tensors="pt")
        words = model.eval()(**tokens).last_hidden_state[0, 1:-1][:SEGMENTS]  # no [CLS], [SEP]
        sentences[k, : len(words)] = words
    return replace(
        released,
        features=released.features | {"text": Sentences(sentences, released.labels)},
        events=released.events | {"text": in_all_segments(released.labels, K)},
    )


class Sentences:
    """Features [N, T, C] of clips that have the sentence of their category.

    Args:
        sentences: Features of the categories, [K, T, C].
        labels: Category of each clip, int64 [N].
    """

    def __init__(self, sentences: Tensor, labels: Tensor) -> None:
        self.sentences, self.labels = sentences, labels
        self.shape = (len(labels), *sentences.shape[1:])

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Features [n, T, C] of the clips with these indices."""
        return self.sentences[self.labels[rows]]
