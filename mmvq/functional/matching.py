"""The cross-modal code matching loss L_cmcm: paired clips should use the same codes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor

from mmvq.functional.batch import WHOLE, Batch
from mmvq_kernels import code_log_probabilities

__all__ = ["code_log_probabilities", "code_matching", "code_matching_ref", "code_probabilities"]


def code_probabilities(x: Tensor, codebook: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Probability of each code for each clip.

    $$P(l) = \frac{1}{T} \sum_t \mathrm{softmax}_l(-\lVert z_t - e_l \rVert_2)$$

    Args:
        x: features of B clips, `[B, T, D]`.
        codebook: codes `[L, D]`.
        mask: padding mask, bool `[B, T]`, True = valid; the mean is over valid segments.

    Returns:
        Probabilities `[B, L]`, in at least float32; each row sums to 1. Gradients are finite even
        if x equals a code (the gradient of that distance is 0).

    Source: Liu et al. 2021, "Cross-Modal Discrete Representation Learning", Sec. 3.3. The released
    code takes the root of a difference that can be 0, which makes its gradient NaN.

    Examples:
        >>> codebook = torch.tensor([[0.0], [2.0]])
        >>> code_probabilities(torch.ones(1, 5, 1), codebook)  # halfway between the codes
        tensor([[0.5000, 0.5000]])
    """
    return code_log_probabilities(x, codebook, mask).exp()


def code_matching(
    features: Mapping[str, Tensor],
    codebook: Tensor | Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None = None,
    *,
    batch: Batch = WHOLE,
) -> Tensor:
    r"""L_cmcm: identify from the codes alone which clips of two modalities belong together.

    $$S_{ij} = \sum_l P^a_i(l) \ln P^b_j(l) + P^b_j(l) \ln P^a_i(l), \qquad
      L = -\frac{1}{2B} \sum_i \ln \frac{e^{S_{ii}}}{\sum_j e^{S_{ij}}}
                           + \ln \frac{e^{S_{ii}}}{\sum_j e^{S_{ji}}}$$

    The loss is averaged over the unordered pairs of modalities. A clip must have a valid segment in
    both modalities of a pair; otherwise it is neither query nor candidate for that pair.

    Args:
        features: features, name -> `[B, T, D]`; T may differ between modalities.
        codebook: codes `[L, D]`, or name -> `[L, D]`, tied by index.
        masks: padding masks, name -> bool `[B, T]`, True = valid.
        batch: result of `mmvq.distributed.gather_batch_sizes`, if the clips are split over ranks:
            clips of all ranks are candidates, and the mean is over all clips.

    Returns:
        Scalar in nats, finite even if a feature equals a code. It is ln B if all clips use the
        codes alike, and 0 with fewer than two modalities.

    Source: Liu et al. 2021, Eq. 6-8, the "L_cmcm" of Sec. 4.4. The released code takes the softmax
    over rows only, adds 1e-10 inside logarithms and 1e-5 to the denominator, and weighs the sum
    over pairs by a half.

    Examples:
        >>> alike = torch.zeros(8, 10, 4)
        >>> code_matching({"audio": alike, "video": alike}, torch.randn(16, 4))  # ln 8
        tensor(2.0794)
    """
    log_p = _log_probabilities(features, codebook, masks)  # name -> [B, L]
    pairs = list(combinations(log_p, 2))
    if not pairs:
        return next(iter(log_p.values())).new_zeros(())
    every = {name: batch.gather(p) for name, p in log_p.items()}
    both: list[Tensor] = []
    for a, b in pairs:
        there = _similarity(log_p[a], every[b])  # [B, B of all ranks]
        both += [there, there.T if batch.whole else _similarity(log_p[b], every[a])]
    scores: Tensor = torch.stack(both).unflatten(0, (-1, 2))  # [pairs, 2, B, B of all ranks]
    if masks is None and batch.whole and all(x.shape[1] for x in features.values()):
        own = scores.log_softmax(-1).diagonal(0, -2, -1)
        return own.neg().sum() / max(own.numel(), 1)
    if masks is None:
        masks = {name: x.new_ones(x.shape[:2], dtype=torch.bool) for name, x in features.items()}
    some = {name: mask.any(1) for name, mask in masks.items()}
    paired = torch.stack([some[a] & some[b] for a, b in pairs])  # [pairs, B]
    keep = paired[:, None, :, None] & batch.gather(paired, 1)[:, None, None]
    scores = torch.where(keep, scores, torch.finfo(scores.dtype).min)
    own = scores.log_softmax(-1).diagonal(batch.offset, -2, -1)  # [pairs, 2, B]
    own = torch.where(paired[:, None], own, 0)
    total, count = batch.sum(own.neg().sum((1, 2)), paired.sum(1))
    return (total / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1) / 2


def _log_probabilities(
    features: Mapping[str, Tensor],
    codebook: Tensor | Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """`ln P` of each modality: all in one call where T, D, dtype and codebook are the same."""
    names = sorted(features)
    z = [features[name] for name in names]
    codes = [codebook if isinstance(codebook, Tensor) else codebook[name] for name in names]
    valid = [None if masks is None else masks[name] for name in names]
    if all(
        x.shape[1:] == z[0].shape[1:] and x.dtype == z[0].dtype and e is codes[0]
        for x, e in zip(z, codes, strict=True)
    ):
        mask = None if masks is None else torch.cat([masks[name] for name in names])
        with torch.autocast(z[0].device.type, enabled=False):  # joins tensors of some dtypes only
            x = torch.cat(z)
        whole = code_log_probabilities(x, codes[0], mask)
        return dict(zip(names, whole.split([len(x) for x in z]), strict=True))
    return {
        name: code_log_probabilities(x, e, mask)
        for name, x, e, mask in zip(names, z, codes, valid, strict=True)
    }


def _similarity(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Similarity S of each row of `[N, L]` and each of `[C, L]`: `[N, C]`."""
    dtype = torch.promote_types(log_p.dtype, log_q.dtype)
    log_p, log_q = log_p.to(dtype), log_q.to(dtype)
    with torch.autocast(log_p.device.type, enabled=False):
        return torch.cat([log_p.exp(), log_p], 1) @ torch.cat([log_q, log_q.exp()], 1).T


def code_matching_ref(features: Mapping[str, Tensor], codebook: Tensor) -> Tensor:
    """Slow reference of `code_matching` for two modalities without masks: one pair at a time.

    Examples:
        >>> z = {name: torch.randn(3, 5, 4, dtype=torch.float64) for name in ("audio", "video")}
        >>> codebook = torch.randn(6, 4, dtype=torch.float64)
        >>> torch.allclose(code_matching(z, codebook), code_matching_ref(z, codebook))
        True
    """
    p, q = (
        torch.softmax(-(z[:, :, None] - codebook).norm(dim=-1), -1).mean(1)
        for z in features.values()
    )
    rows = [torch.stack([(a * b.log() + b * a.log()).sum() for b in q]) for a in p]
    s = torch.stack(rows)  # [B, B]
    both = s.log_softmax(0) + s.log_softmax(1)
    return -both.diagonal().mean() / 2
