"""Eq. 8 against loops.

ATOL: a squared norm of D = 3 entries, each difference below 2, is at most 12; all terms together
are below 3 * 0.3 * (1 + 0.7) * 12 = 18.4, each off by (N + D + 4) roundings, N = 20 positions.
"""

from __future__ import annotations

import pytest
import torch
from support import DTYPES, bools, close, rounding, strided, uniform, wide
from torch import Tensor

from mmvq.functional import commitment, commitment_ref

B, T, D = 4, 5, 3
NAMES = ("video", "audio", "text")
Tensors = dict[str, Tensor]


def atol(dtype: torch.dtype) -> float:
    return rounding(wide(dtype), B * T + D + 4, 18.4)


def batch(
    dtype: torch.dtype = torch.float64, names: tuple[str, ...] = NAMES
) -> tuple[Tensors, Tensors]:
    z = {m: uniform(B, T, D, dtype=dtype, seed=i) for i, m in enumerate(names)}
    return z, {m: uniform(B, T, D, dtype=dtype, seed=9 + i) for i, m in enumerate(names)}


def some_masks() -> Tensors:
    """Text is absent, so that it is nobody's other modality."""
    masks = {m: bools(B, T, seed=i) for i, m in enumerate(NAMES)}
    return masks | {"text": torch.zeros(B, T, dtype=torch.bool)}


def loop(
    z: Tensors, e: Tensors, masks: Tensors, beta: float, ratio: dict[tuple[str, str], float]
) -> float:
    """One position at a time, summed over D."""
    loss = 0.0
    for a in z:
        others = [b for b in z if b != a and (masks[a] & masks[b]).any()]
        weights = {a: beta} | {b: beta * ratio.get((a, b), 0.0) / len(others) for b in others}
        for b, weight in weights.items():
            norms = [
                (z[a][i, t] - e[b][i, t]).square().sum().item()
                for i in range(B)
                for t in range(T)
                if masks[a][i, t] and masks[b][i, t]
            ]
            loss += weight * sum(norms) / max(len(norms), 1)
    return loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", [NAMES[:1], NAMES[:2], NAMES], ids=len)
def test_equals_the_reference(dtype: torch.dtype, names: tuple[str, ...]) -> None:
    z, e = batch(dtype, names)
    rows = [{m: x.flatten(0, 1).double() for m, x in part.items()} for part in (z, e)]
    expected = commitment_ref(rows[0], rows[1], beta=0.3, cross_ratio=0.7)
    total = commitment(z, e, beta=0.3, cross_ratio=0.7, reduction="sum")
    mean = commitment(z, e, beta=0.3, cross_ratio=0.7)
    assert total.dtype == mean.dtype == wide(dtype)
    close(total, expected, atol(dtype))
    close(mean, expected / D, atol(dtype))


@pytest.mark.parametrize("pairs", ["all", "one way"])
def test_masks_and_pairwise_ratios_equal_the_loop(pairs: str) -> None:
    z, e = batch()
    masks = some_masks()
    ratio = {(a, b): 0.5 for a in z for b in z} if pairs == "all" else {("audio", "video"): 2.0}
    expected = loop(z, e, masks, 0.25, ratio)
    cross_ratio = 0.5 if pairs == "all" else ratio
    out = commitment(z, e, masks, cross_ratio=cross_ratio, reduction="sum")
    close(out, expected, atol(z["audio"].dtype))
    out = commitment(z, e, masks, cross_ratio=cross_ratio)
    close(out, expected / D, atol(z["audio"].dtype))


def test_analytic() -> None:
    """All differences are 2: two own terms beta 4, two cross terms beta / 2 4."""
    z = {m: torch.ones(B, T, D) for m in "ab"}
    e = {m: -torch.ones(B, T, D) for m in "ab"}
    assert commitment(z, e) == 0.25 * 4 * 2 + 0.125 * 4 * 2
    assert commitment(z, e, reduction="sum") == D * 3
    assert commitment(z, e, cross_ratio=0) == 2
    assert commitment(z, z) == 0


def test_padding_strides_and_nothing() -> None:
    z, e = batch()
    masks = some_masks()
    spoilt = {m: torch.where(masks[m][..., None], x, torch.nan) for m, x in z.items()}
    spoilt = {m: strided(x).requires_grad_() for m, x in spoilt.items()}
    loss = commitment(spoilt, e, masks)
    close(loss, commitment(z, e, masks), atol(torch.float64))
    loss.backward()
    for m, x in spoilt.items():
        assert x.grad is not None
        assert (x.grad[~masks[m]] == 0).all()
        assert x.grad[masks[m]].isfinite().all()
    empty = {m: x[:0] for m, x in z.items()}
    assert commitment(empty, empty) == 0
    none = {m: torch.zeros_like(mask) for m, mask in masks.items()}
    assert commitment(z, e, none) == 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_reaches_the_features_alone(reduction: str) -> None:
    z, e = batch()
    masks = some_masks()
    inputs = [x.requires_grad_() for x in z.values()]
    codes = {m: x.requires_grad_() for m, x in e.items()}

    def loss(*features: Tensor) -> Tensor:
        return commitment(dict(zip(z, features, strict=True)), codes, masks, reduction=reduction)

    assert torch.autograd.gradcheck(loss, inputs)
    loss(*inputs).backward()
    assert all(x.grad is None for x in codes.values())
