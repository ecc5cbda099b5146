"""Features of the prompts: the words of a category's sentence, as a text encoder reads them."""

from __future__ import annotations

import torch

from ..errors import DataError
from .sets import SEGMENTS, ReleasedSet


@torch.no_grad()
def with_text(released: ReleasedSet, encoder: str) -> ReleasedSet:
    """The same set with a modality "text": every clip has the sentence of its category.

    The vectors of the first 10 tokens, zeros after the last, as the release pads them (it takes
    whole words of a fixed vocabulary). Text names the event in every segment.

    Args:
        released: A set with prompts.
        encoder: A BERT of Hugging Face, by name or folder; the release has bert-base-uncased, 768.

    Raises:
        DataError: transformers is not installed, or has no such encoder here, or a category has no
            prompt.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise DataError("text: needs transformers. Hint: pip install transformers") from error
    try:
        tokenizer, model = (x.from_pretrained(encoder) for x in (AutoTokenizer, AutoModel))
    except (OSError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise DataError(f"--text-encoder {encoder}: cannot be loaded ({first}).") from error
    K = len(released.categories)
    sentences = torch.zeros(K, SEGMENTS, model.config.hidden_size)
    for k, category in enumerate(released.categories):
        if category not in released.prompts:
            raise DataError(f"text: category '{category}' has no prompt in the table of prompts.")
        tokens = tokenizer(released.prompts[category], return_tensors="pt")
        words = model.eval()(**tokens).last_hidden_state[0, 1:-1][:SEGMENTS]  # no [CLS], no [SEP]
        sentences[k, : len(words)] = words
    events = torch.nn.functional.one_hot(released.labels, K).bool()[:, None]
    return ReleasedSet(
        **vars(released)
        | {
            "features": released.features | {"text": sentences[released.labels]},
            "events": released.events | {"text": events.expand(-1, SEGMENTS, -1)},
        }
    )
