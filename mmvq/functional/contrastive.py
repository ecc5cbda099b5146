"""InfoNCE, the contrast under Cross-CPC (Eq. 6)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit_length


def similarities(
    query: Tensor, key: Tensor, *, temperature: float = 1.0, normalize: bool = False
) -> Tensor:
    """Scores `[..., N, N]` of every query (rows) against every key (columns)."""
    if normalize:
        query, key = unit_length(query, dim=-1), unit_length(key, dim=-1)
    return query @ key.mT / temperature


def matched_cross_entropy(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """`-log softmax` over the last axis, at the diagonal: `[..., N, N]` -> `[..., N]`.

    Pairs that are not valid in `mask` `[..., N]` are no candidates, and their own entry is 0.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask is None:
        return logits.logsumexp(-1) - logits.diagonal(dim1=-2, dim2=-1)
    keep = mask[..., :, None] & mask[..., None, :]
    logits = torch.where(keep, logits, torch.finfo(logits.dtype).min)
    loss = logits.logsumexp(-1) - logits.diagonal(dim1=-2, dim2=-1)
    return torch.where(mask, loss, 0)


def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    normalize: bool = False,
    symmetric: bool = False,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    r"""InfoNCE: pick, among N keys, the one that belongs to each query (Eq. 6, one step).

    $$L = -\frac{1}{N} \sum_i \ln \frac{\exp(q_i \cdot k_i / \tau)}
      {\sum_j \exp(q_i \cdot k_j / \tau)}$$

    Args:
        query: `[..., N, D]`. Leading dimensions are independent problems.
        key: `[..., N, D]`; the negatives of a query are the other keys along N.
        mask: bool `[..., N]`, True = valid pair; the others are neither queries nor candidates.
        temperature: tau.
        normalize: cosine similarity instead of the dot product.
        symmetric: the mean of both directions, query to key and key to query.
        reduction: `"mean"` over all valid queries, or `"none"`.

    Returns:
        A scalar in nats (0 when nothing is valid), or `[..., N]`; ln N when all keys look alike.

    Source: van den Oord et al. 2018; Eq. 6.
    """
    if mask is not None:  # a NaN under a False must not reach the gradient of the others
        query, key = (torch.where(mask[..., None], x, 0) for x in (query, key))
    logits = similarities(query, key, temperature=temperature, normalize=normalize)
    loss = matched_cross_entropy(logits, mask)
    if symmetric:
        loss = (loss + matched_cross_entropy(logits.mT, mask)) / 2
    if reduction == "none":
        return loss
    count = loss.numel() if mask is None else mask.expand_as(loss).sum()
    return loss.sum() / torch.as_tensor(count).clamp(min=1)


def matched(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """Whether each query scores its own key highest: bool `[..., N]`; see `info_nce`."""
    logits = similarities(query, key, temperature=temperature, normalize=normalize)
    if mask is not None:
        logits = logits.masked_fill(~mask[..., None, :], -torch.inf)
    if logits.numel() == 0:
        return logits.new_zeros(logits.shape[:-1], dtype=torch.bool)
    hits = logits.argmax(-1) == torch.arange(logits.shape[-1], device=logits.device)
    return hits if mask is None else hits & mask


def info_nce_ref(query: Tensor, key: Tensor, temperature: float = 1.0) -> Tensor:
    """One problem, `[N, D]` each, one query at a time."""
    losses = [
        -torch.log_softmax(torch.stack([q @ k for k in key]) / temperature, 0)[i]
        for i, q in enumerate(query)
    ]
    return torch.stack(losses).mean()
