"""Retrieval across modalities by tokens: find the videos that sound like this clip.

    sounds = model.tokens({"audio": x})["audio"]
    videos = model.tokens({"video": y})["video"]
    found = find(model, sounds[:1], videos)  # the numbers of ten videos, the best first

The similarity of two clips is the mean over time of the cosine of their codes. It was chosen by the
recall of a clip's own other modalities on split 1 of the built-in digits (400 clips, all
directions, seeds 0 and 1, recall at 5): 0.75, as with Euclidean distances. Where time is left out,
it is 0.31 for the cosine of mean codes and 0.22 for tf-idf of tokens; but of the first ten clips,
mean codes find 0.96 of the class of the query, and this similarity 0.93.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .trained import TrainedModel


def find(model: TrainedModel, query: Tensor, gallery: Tensor, k: int = 10) -> Tensor:
    """The clips of the gallery that are most similar to each query.

    Args:
        model: The model that the tokens are of.
        query: Tokens int64 [n, T] of one modality, -1 where not valid.
        gallery: Tokens int64 [m, T'] of the same modality or another.
        k: Number of clips to find.

    Returns:
        Their numbers, int64 [n, min(k, m)], the most similar first; -1 in place of clips without a
        segment that is valid in both.
    """
    like, found = similarity(query, gallery, model.codebook).sort(
        dim=1, descending=True, stable=True
    )
    return torch.where(like > -torch.inf, found, -1)[:, :k]


def similarity(query: Tensor, gallery: Tensor, codebook: Tensor) -> Tensor:
    """Mean over time of the cosine of the codes, float32 [n, m].

    Segments count that are valid in both clips; -inf if there are none. If T and T' differ, codes
    are compared at the same share of the length.

    Args:
        query: Tokens int64 [n, T], -1 where not valid.
        gallery: Tokens int64 [m, T'].
        codebook: Codes [L, D].
    """
    unit = normalize(codebook.detach().cpu().float(), dim=1)
    cosine = torch.zeros(len(unit) + 1, len(unit) + 1)  # the last row and column are of -1
    cosine[:-1, :-1] = unit @ unit.T
    T = max(query.shape[1], gallery.shape[1])
    total, count = torch.zeros(2, len(query), len(gallery))
    for a, b in zip(_stretched(query, T).T, _stretched(gallery, T).T, strict=True):
        total += cosine[a][:, b]
        count += (a >= 0)[:, None] & (b >= 0)
    return (total / count).where(count > 0, -torch.inf)


def _stretched(tokens: Tensor, T: int) -> Tensor:
    """Tokens [n, T] at T times, evenly spaced."""
    return tokens[:, ((torch.arange(T) + 0.5) * tokens.shape[1] / T).long()]


def ranks(similarity: Tensor) -> Tensor:
    """The rank of each query's own item, int64 [n], 1 = first; ties rank it last.

    Args:
        similarity: Similarities [n, n]; query i belongs to item i.
    """
    return (similarity >= similarity.diagonal()[:, None]).sum(1)


def recall(ranks: Tensor, k: int) -> float:
    """The share of queries whose own item is among the first k."""
    return (ranks <= k).double().mean().item()
