"""The torch path of fused quantization, against the functions of the library in float64.

The path computes in float32. Differences of vectors and codes are below 2, so that a squared norm
is at most 4 D: the loss of M modalities is at most M (own + cross) 4 D in a sum, a D-th in a mean.
ATOL bounds the gradient of a row over 1 + its ratio of lengths: a rotation has three terms of at
most sqrt(D), with D roundings in a product and a division by |x + e| of unit vectors, which is at
least 1 here; the loss has M smaller ones.
"""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from support import bools, close, rounding, uniform
from torch import Tensor

from mmvq import functional
from mmvq_kernels.commitment import backward_torch, forward_torch

P, D, L = 20, 5, 9
OWN, CROSS = 0.25, 0.1
MODALITIES = pytest.mark.parametrize("M", [1, 2, 3])
MASKED = pytest.mark.parametrize("masked", [False, True])
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum"])
GRADIENTS = {False: functional.straight_through, True: functional.rotate}
Reduction = Literal["mean", "sum"]
ATOL = rounding(torch.float32, D + 20, 4 * D**0.5)


def inputs(M: int, masked: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Vectors, codes, index of the nearest code, mask: three of M modalities have one absent."""
    rows, codes = (uniform(n, D, dtype=torch.float32, seed=i) for i, n in enumerate((M * P, L)))
    nearest = functional.nearest_code(rows, codes)
    if not masked:
        return rows, codes, nearest, None
    valid = bools(M * P, seed=2)
    valid[P * (M - 1) :] &= M < 3
    return rows, codes, nearest, valid


def expected(
    rows: Tensor, chosen: Tensor, valid: Tensor | None, M: int, reduction: Reduction, rotation: bool
) -> tuple[Tensor, Tensor]:
    """Quantized vectors and the loss, in the dtype of the arguments."""
    names = [f"m{m}" for m in range(M)]
    z, e = (dict(zip(names, x.view(M, P, D), strict=True)) for x in (rows, chosen))
    masks = None if valid is None else dict(zip(names, valid.view(M, P), strict=True))
    ratio = CROSS / OWN
    loss = functional.commitment(z, e, masks, beta=OWN, cross_ratio=ratio, reduction=reduction)
    quantized = GRADIENTS[rotation](rows, chosen)
    return quantized if valid is None else torch.where(valid[:, None], quantized, 0), loss


@MODALITIES
@MASKED
@REDUCTIONS
def test_codes_indices_and_loss(M: int, masked: bool, reduction: Reduction) -> None:
    rows, codes, nearest, valid = inputs(M, masked)
    wanted, total = expected(rows.double(), codes[nearest].double(), valid, M, reduction, False)
    padded = rows if valid is None else torch.where(valid[:, None], rows, torch.nan)
    given = padded, codes, valid, M, OWN, CROSS, reduction == "mean"
    quantized, chosen, index, loss, _ = forward_torch(*given)
    assert torch.equal(quantized.double(), wanted)
    fit = torch.ones_like(nearest, dtype=torch.bool) if valid is None else valid
    assert torch.equal(chosen[fit], codes[nearest][fit])
    assert torch.equal(index, torch.where(fit, nearest, -1))
    width = D if reduction == "sum" else 1
    close(loss, total, rounding(torch.float32, P + D + 6, M * (OWN + CROSS) * 4 * width))


@MODALITIES
@MASKED
@REDUCTIONS
@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("of", ["both", "codes", "loss"])
def test_the_gradient(M: int, masked: bool, reduction: Reduction, rotation: bool, of: str) -> None:
    rows, codes, nearest, valid = inputs(M, masked)
    chosen = codes[nearest]
    weights = forward_torch(rows, codes, valid, M, OWN, CROSS, reduction == "mean")[-1]
    flow, times = uniform(M * P, D, seed=3), torch.tensor(3.0).double()
    wide = rows.double().requires_grad_()
    quantized, loss = expected(wide, chosen.double(), valid, M, reduction, rotation)
    parts = {"codes": (quantized * flow).sum(), "loss": times * loss}
    (sum(parts.values()) if of == "both" else parts[of]).backward()
    used = None if of == "loss" else flow.float(), None if of == "codes" else times.float()
    padded = rows if valid is None else torch.where(valid[:, None], rows, torch.nan)
    grad = backward_torch(padded, chosen, valid, weights, *used, rotation)
    assert grad.dtype == torch.float32
    assert wide.grad is not None
    ratio = chosen.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True) if rotation else 0
    close(grad / (1 + ratio), wide.grad / (1 + ratio), ATOL)
    if valid is not None:
        assert not grad[~valid].any()


def test_nothing_flows_back() -> None:
    rows, codes, nearest, _ = inputs(2, False)
    weights = torch.ones(2, 2)
    grad = backward_torch(rows, codes[nearest], None, weights, None, None, True)
    assert torch.equal(grad, torch.zeros_like(rows))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    """Computed in float32, and rounded once."""
    rows, codes, _, valid = inputs(2, True)
    x = rows.to(dtype)
    wide = forward_torch(x.float(), codes, valid, 2, OWN, CROSS, True)
    narrow = forward_torch(x, codes, valid, 2, OWN, CROSS, True)
    assert narrow[0].dtype == dtype
    assert torch.equal(narrow[0], wide[0].to(dtype))
    for mine, theirs in zip(narrow[1:], wide[1:], strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    flow = uniform(2 * P, D, dtype=dtype, seed=3)
    args = wide[1], valid, wide[4]
    grad = backward_torch(x, *args, flow, torch.tensor(3.0), True)
    assert grad.dtype == dtype
    wanted = backward_torch(x.float(), *args, flow.float(), torch.tensor(3.0), True)
    assert torch.equal(grad, wanted.to(dtype))


def test_vectors_that_are_not_finite_show() -> None:
    rows, codes, _, _ = inputs(2, False)
    rows[1, 2], rows[P, 0] = torch.nan, torch.inf
    quantized, _, index, loss, _ = forward_torch(rows, codes, None, 2, OWN, CROSS, True)
    assert quantized.isnan().nonzero().tolist() == [[1, 2], [P, 0]]
    assert index[1] == index[P] == 0
    assert not loss.isfinite()


def test_an_empty_batch() -> None:
    nothing = torch.zeros(0, D)
    codes = uniform(L, D, dtype=torch.float32)
    quantized, chosen, index, loss, weights = forward_torch(
        nothing, codes, None, 2, OWN, CROSS, True
    )
    assert quantized.shape == chosen.shape == (0, D)
    assert index.shape == (0,)
    assert loss == 0
    grad = backward_torch(nothing, chosen, None, weights, nothing, loss, True)
    assert grad.shape == (0, D)
