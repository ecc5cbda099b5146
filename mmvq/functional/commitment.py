"""The cross-modal commitment loss (Eq. 8)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor


def commitment(
    features: Mapping[str, Tensor],
    codes: Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None = None,
    *,
    beta: float = 0.25,
    cross_ratio: float | Mapping[tuple[str, str], float] = 0.5,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    r"""Pull each modality's vectors to its own codes and to the codes of the others (Eq. 8).

    $$L = \sum_a \Big( \beta \lVert z^a - \mathrm{sg}[e^a] \rVert^2 + \frac{1}{M - 1}
      \sum_{b \ne a} \rho_{ab} \beta \lVert z^a - \mathrm{sg}[e^b] \rVert^2 \Big)$$

    Each norm is averaged over the positions that are valid in both a and b. A pair without such
    positions is left out, and does not count in M - 1. No gradient reaches the codes.

    Args:
        features: features z, name -> `[..., D]`.
        codes: chosen codes e, name -> same shape as the features.
        masks: padding masks, name -> bool `[...]`, True = valid.
        beta: weight of the loss.
        cross_ratio: ratio rho for all pairs, or a mapping from ordered pairs to ratios, in which
            (a, b) pulls z_a towards e_b; a missing pair has ratio 0.
        reduction: `"mean"` also averages the squared norm over D; `"sum"` is exactly Eq. 8.

    Returns:
        Scalar, in at least float32; 0 if nothing is valid.

    Source: Eq. 8, for M = 2. The released code averages over D, and weighs own and cross terms by
    2 beta and beta. With three modalities its cross terms are beta / 2 each.

    Examples:
        >>> z = {"audio": torch.ones(4, 2), "video": torch.zeros(4, 2)}
        >>> codes = {"audio": torch.zeros(4, 2), "video": torch.zeros(4, 2)}
        >>> commitment(z, codes)  # 0.25 for audio to its own codes, 0.125 to those of video
        tensor(0.3750)
    """
    first, *rest = commitment_terms(
        features, codes, masks, beta=beta, cross_ratio=cross_ratio, reduction=reduction
    ).values()
    return sum(rest, first)


def commitment_terms(
    features: Mapping[str, Tensor],
    codes: Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None = None,
    *,
    beta: float = 0.25,
    cross_ratio: float | Mapping[tuple[str, str], float] = 0.5,
    reduction: Literal["mean", "sum"] = "mean",
) -> dict[str, Tensor]:
    """Compute the term of each modality a in `commitment`: name -> scalar, at least float32.

    Examples:
        >>> z = {"audio": torch.ones(4, 2), "video": torch.zeros(4, 2)}
        >>> codes = {"audio": torch.zeros(4, 2), "video": torch.zeros(4, 2)}
        >>> commitment_terms(z, codes)
        {'audio': tensor(0.3750), 'video': tensor(0.)}
    """
    names = sorted(features)
    terms: dict[str, Tensor] = {}
    for a in names:
        terms[a] = beta * _distance(features, codes, masks, a, a, reduction)
        ratios = {b: _ratio(cross_ratio, a, b) for b in names if b != a}
        if not any(ratios.values()):
            continue
        present = sum(1 if masks is None else (masks[a] & masks[b]).any().long() for b in ratios)
        for b, ratio in ratios.items():
            if ratio:
                cross = _distance(features, codes, masks, a, b, reduction)
                terms[a] = terms[a] + ratio * beta * cross / _at_least_one(present)
    return terms


def commitment_ref(
    features: Mapping[str, Tensor],
    codes: Mapping[str, Tensor],
    *,
    beta: float = 0.25,
    cross_ratio: float = 0.5,
) -> Tensor:
    """Slow reference of `commitment` for `[N, D]` without masks: Eq. 8, one vector at a time.

    Examples:
        >>> z, codes = ({name: torch.randn(4, 2) for name in ("audio", "video")} for _ in range(2))
        >>> torch.allclose(commitment(z, codes, reduction="sum"), commitment_ref(z, codes))
        True
    """
    loss = torch.zeros(())
    for a, z in features.items():
        others = [b for b in features if b != a]
        for i in range(len(z)):
            loss = loss + beta * (z[i] - codes[a][i]).square().sum() / len(z)
            for b in others:
                cross = (z[i] - codes[b][i]).square().sum()
                loss = loss + cross_ratio * beta * cross / len(z) / len(others)
    return loss


def _ratio(cross_ratio: float | Mapping[tuple[str, str], float], a: str, b: str) -> float:
    return cross_ratio.get((a, b), 0.0) if isinstance(cross_ratio, Mapping) else cross_ratio


def _distance(
    features: Mapping[str, Tensor],
    codes: Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None,
    a: str,
    b: str,
    reduction: Literal["mean", "sum"],
) -> Tensor:
    z, e = features[a], codes[b].detach()
    dtype = torch.promote_types(torch.promote_types(z.dtype, e.dtype), torch.float32)
    z, e = z.to(dtype), e.to(dtype)
    count: Tensor | int = math.prod(z.shape[:-1])  # an export would fix `numel`
    if masks is not None:
        valid = masks[a] & masks[b]
        z, e = (torch.where(valid[..., None], x, 0) for x in (z, e))
        count = valid.sum()
    width = z.shape[-1] if reduction == "mean" else 1
    squares = torch.nn.functional.mse_loss(z, e, reduction="sum")
    return squares / _at_least_one(count * width)


def _at_least_one(count: Tensor | int) -> Tensor | int:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
