"""InfoNCE, the contrastive loss of Cross-CPC (Eq. 6)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmvq.functional.batch import WHOLE, Batch
from mmvq_kernels.messages import message


def similarities(
    query: Tensor, key: Tensor, *, temperature: float = 1.0, normalize: bool = False
) -> Tensor:
    """Score every query (rows) against every key (columns): `[..., N, C]`, at least float32.

    Examples:
        >>> similarities(torch.eye(2), 4 * torch.eye(2), temperature=0.5)
        tensor([[8., 0.],
                [0., 8.]])
    """
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
    query, key = query.to(dtype), key.to(dtype)
    with torch.autocast(query.device.type, enabled=False):  # scores may exceed float16
        if normalize:
            query, key = unit_length(query), unit_length(key)
        return query @ key.mT / temperature


def unit_length(x: Tensor) -> Tensor:
    """Compute `x / |x|` at any scale; a zero vector stays 0, and gets no gradient."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm == 0, torch.inf)


def matched_cross_entropy(
    logits: Tensor,
    mask: Tensor | None = None,
    candidates: Tensor | None = None,
    *,
    offset: int = 0,
) -> Tensor:
    """Cross entropy of each row, with targets on the diagonal: `[..., N, C]` -> `[..., N]`.

    The target of row i is column `offset` + i. Rows that are False in `mask` `[..., N]` have loss
    0. Columns that are False in `candidates` `[..., C]` (None: `mask`) are ignored.
    """
    if mask is None:
        return logits.logsumexp(-1) - logits.diagonal(offset, dim1=-2, dim2=-1)
    candidates = mask if candidates is None else candidates
    keep = mask[..., :, None] & candidates[..., None, :]
    logits = torch.where(keep, logits, torch.finfo(logits.dtype).min)
    loss = logits.logsumexp(-1) - logits.diagonal(offset, dim1=-2, dim2=-1)
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
    batch: Batch = WHOLE,
) -> Tensor:
    r"""InfoNCE: identify the key of each query among N keys (Eq. 6, one step).

    $$L = -\frac{1}{N} \sum_i \ln \frac{\exp(q_i \cdot k_i / \tau)}
      {\sum_j \exp(q_i \cdot k_j / \tau)}$$

    Args:
        query: queries `[..., N, D]`; leading dimensions are independent problems.
        key: keys `[..., N, D]`; the negatives of a query are the other keys along N.
        mask: padding mask, bool `[..., N]`, True = valid pair; other pairs are ignored.
        temperature: temperature tau, which divides the scores.
        normalize: whether to score by the cosine instead of the dot product.
        symmetric: whether to average both directions, query to key and key to query.
        reduction: `"mean"` over all valid queries, or `"none"`.
        batch: result of `mmvq.distributed.gather_batch_sizes`, if N is split over ranks: keys of
            all ranks are candidates, and the mean is over all queries. Either all ranks or none
            pass a mask.

    Returns:
        Scalar in nats (0 if nothing is valid), or `[..., N]`; ln N if all keys are equal.

    Raises:
        ValueError: query and key differ in N or D.

    Source: van den Oord et al. 2018; Eq. 6.

    Examples:
        >>> alike = torch.zeros(8, 16)
        >>> info_nce(alike, alike)  # ln 8
        tensor(2.0794)
        >>> info_nce(100 * torch.eye(8), torch.eye(8))
        tensor(0.)
    """
    if query.shape[-2:] != key.shape[-2:]:
        rule = "query and key must be [..., N, D], with the same N and D"
        hint = "row i of key belongs to row i of query; project both to the same D"
        raise ValueError(message("info_nce", rule, hint=hint, query=query, key=key))
    if mask is not None:  # a NaN in padding must not reach any gradient
        query, key = (torch.where(mask[..., None], x, 0) for x in (query, key))
    candidates = None if mask is None else batch.gather(mask, -1)
    keys = batch.gather(key, -2)
    logits = similarities(query, keys, temperature=temperature, normalize=normalize)
    loss = matched_cross_entropy(logits, mask, candidates, offset=batch.offset)
    if symmetric:
        back = logits.mT
        if not batch.whole:
            queries = batch.gather(query, -2)
            back = similarities(key, queries, temperature=temperature, normalize=normalize)
        loss = (loss + matched_cross_entropy(back, mask, candidates, offset=batch.offset)) / 2
    if reduction == "none":
        return loss
    count = loss.new_full((), loss.numel(), dtype=torch.long)
    if mask is not None:
        count = mask.expand_as(loss).sum()
    total, count = batch.sum(loss.sum(), count)
    return total / count.clamp(min=1)


def top1_hits(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    normalize: bool = False,
    batch: Batch = WHOLE,
) -> Tensor:
    """Whether the own key of each query scores highest: bool `[..., N]`; see `info_nce`.

    Examples:
        >>> top1_hits(torch.eye(3), torch.eye(3)[[0, 2, 1]])
        tensor([ True, False, False])
    """
    candidates = None if mask is None else batch.gather(mask, -1)
    logits = similarities(
        query, batch.gather(key, -2), temperature=temperature, normalize=normalize
    )
    if candidates is not None:
        logits = logits.masked_fill(~candidates[..., None, :], -torch.inf)
    if logits.numel() == 0:
        return logits.new_zeros(logits.shape[:-1], dtype=torch.bool)
    own = batch.offset + torch.arange(query.shape[-2], device=logits.device)
    hits = logits.argmax(-1) == own
    return hits if mask is None else hits & mask


def info_nce_ref(query: Tensor, key: Tensor, temperature: float = 1.0) -> Tensor:
    """Slow reference of `info_nce` for `[N, D]`: one query at a time.

    Examples:
        >>> query, key = torch.randn(2, 6, 4, dtype=torch.float64)
        >>> torch.allclose(info_nce(query, key), info_nce_ref(query, key))
        True
    """
    losses = [
        -torch.log_softmax(torch.stack([q @ k for k in key]) / temperature, 0)[i]
        for i, q in enumerate(query)
    ]
    return torch.stack(losses).mean()
