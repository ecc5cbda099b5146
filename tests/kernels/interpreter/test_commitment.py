"""The commitment kernels against the modules' own loss and gradients, in float64.

ATOL: distances below 2 D in a mean or a sum, whose terms are all positive; the gradient has one
term for each modality and each of them a handful of roundings. It is compared row by row, as the
rotation of one is as long as the ratio of its two lengths.
"""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from support import bools, close, rounding, uniform
from torch import Tensor

from mmvq import functional
from mmvq_kernels import commitment, operators
from mmvq_kernels.nearest import search

SIZES = [(1, 1, 1), (30, 7, 8), (19, 45, 131), (40, 3, 16)]  # P, L, D
GRADIENTS = {False: functional.straight_through, True: functional.rotate}
Reduction = Literal["mean", "sum"]


@pytest.fixture(autouse=True)
def on_the_kernels(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":  # the operators take the CPU for a GPU
        monkeypatch.setattr(operators, "through_operator", lambda *_: True)
        monkeypatch.setattr(operators, "runs_triton", lambda *_: True)


def quantize(
    rows: Tensor, codes: Tensor, valid: Tensor | None, M: int, *terms: Any
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Of `[M P, D]` as features of one clip."""
    features = rows.view(M, 1, len(rows) // M, rows.shape[1]).unbind()
    parts, indices, loss = commitment.quantize(features, rows, codes, valid, *terms)
    return [part[0] for part in parts], indices, loss


def expected(
    rows: Tensor,
    codes: Tensor,
    index: Tensor,
    valid: Tensor | None,
    M: int,
    rho: float,
    reduction: Reduction,
    rotation: bool,
) -> tuple[Tensor, Tensor]:
    """Quantized vectors and the loss, by the functions of the library."""
    z, e = rows.view(M, -1, rows.shape[1]), codes[index].view(M, -1, rows.shape[1])
    names = [f"m{m}" for m in range(M)]
    masks = None if valid is None else dict(zip(names, valid.view(M, -1), strict=True))
    features, chosen = (dict(zip(names, x, strict=True)) for x in (z, e))
    loss = functional.commitment(
        features, chosen, masks, beta=0.25, cross_ratio=rho, reduction=reduction
    )
    quantized = GRADIENTS[rotation](rows, codes[index])
    return quantized if valid is None else torch.where(valid[:, None], quantized, 0), loss


@pytest.mark.parametrize(("P", "L", "D"), SIZES)
@pytest.mark.parametrize("M", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rotation", [False, True])
def test_loss_codes_and_gradient(
    P: int, L: int, D: int, M: int, masked: bool, rotation: bool, device: str
) -> None:
    reduction: Reduction = "sum" if rotation else "mean"
    rows = uniform(M * P, D, dtype=torch.float32).to(device)
    codes = uniform(L, D, dtype=torch.float32, seed=1).to(device)
    valid = bools(M * P, seed=2).to(device) if masked else None
    if valid is not None:
        valid[:P] = False  # a modality that is absent
        rows[~valid] = torch.nan
    mine = rows.clone().requires_grad_()
    terms = 0.25, 0.1, reduction == "mean", rotation
    parts, indices, loss = quantize(mine, codes, valid, M, *terms)
    index = search(rows, codes, False)
    flow = uniform(M * P, D, dtype=torch.float32, seed=3).to(device)
    clean = rows if valid is None else torch.where(valid[:, None], rows, 0)
    wide = clean.double().requires_grad_()
    arguments = codes.double(), index, valid, M, 0.1 / 0.25, reduction, rotation
    quantized, wanted = expected(wide, *arguments)
    assert torch.equal(indices, index if valid is None else torch.where(valid, index, -1))
    assert torch.equal(torch.cat(parts).double(), quantized.detach())
    width = 1 if reduction == "mean" else D
    close(loss.cpu(), wanted.cpu(), rounding(torch.float32, D + P, 8 * width))
    (3 * loss + (torch.cat(parts) * flow).sum()).backward()
    (3 * wanted + (quantized * flow).sum()).backward()
    if valid is not None:
        assert not mine.grad[~valid].any()
    # a rotation has three terms of at most sqrt(D), times its row's own ratio of lengths; its unit
    # vectors are divided by |x + e|, which is at least 1 here, or 0, and then it is none
    share = torch.ones(M * P, 1, dtype=torch.float64, device=device)
    if rotation:
        lengths = clean.double().norm(dim=1, keepdim=True)
        ratio = codes[index].double().norm(dim=1, keepdim=True) / lengths
        share = torch.where(lengths > 0, 1 + ratio, share)
    found, gradient = mine.grad.double() / share, wide.grad / share
    close(found.cpu(), gradient.cpu(), rounding(torch.float32, 20 + D, 4 * D**0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype, device: str) -> None:
    rows = uniform(40, 8, dtype=dtype).to(device).requires_grad_()
    codes = uniform(9, 8, dtype=torch.float32, seed=1).to(device)
    parts, index, loss = quantize(rows, codes, None, 2, 0.25, 0.1, True, False)
    assert parts[0].dtype == dtype
    assert torch.equal(torch.cat(parts), codes[index].to(dtype))
    arguments = codes.double(), index, None, 2, 0.4, "mean", False
    _, wanted = expected(rows.double(), *arguments)
    close(loss.cpu(), wanted.cpu(), rounding(torch.float32, 8 + 40, 8))
    loss.backward()
    assert rows.grad is not None
    assert rows.grad.dtype == dtype


def test_only_one_of_the_outputs_is_used(device: str) -> None:
    codes = uniform(9, 5, dtype=torch.float32, seed=1).to(device)
    grads = []
    for used in ("first", "second", "loss", "all"):
        rows = uniform(12, 5, dtype=torch.float32).to(device).requires_grad_()
        (a, b), _, loss = quantize(rows, codes, None, 2, 0.25, 0.1, True, False)
        outputs = {"first": a.sum(), "second": 2 * b.sum(), "loss": loss}
        (sum(outputs.values()) if used == "all" else outputs[used]).backward()
        grads.append(rows.grad.cpu())
    assert torch.equal(grads[0], torch.tensor([[1.0]] * 6 + [[0.0]] * 6).expand(12, 5))
    assert torch.equal(grads[1], torch.tensor([[0.0]] * 6 + [[2.0]] * 6).expand(12, 5))
    close(sum(grads[:3]), grads[3], rounding(torch.float32, 4, 4))


def test_vectors_that_are_not_finite_show(device: str) -> None:
    rows = uniform(12, 5, dtype=torch.float32).to(device)
    rows[1, 2], rows[7, 0] = torch.nan, torch.inf
    codes = uniform(9, 5, dtype=torch.float32, seed=1).to(device)
    (a, b), index, loss = quantize(rows, codes, None, 2, 0.25, 0.1, True, False)
    assert index[1] == index[7] == 0
    assert a[1, 2].isnan()
    assert b[1, 0].isnan()
    assert int(a.isnan().sum() + b.isnan().sum()) == 2
    assert not loss.isfinite()


def test_quantized_may_be_changed_in_place(device: str) -> None:
    rows = uniform(12, 5, dtype=torch.float32).to(device).requires_grad_()
    codes = uniform(9, 5, dtype=torch.float32, seed=1).to(device)
    (a, b), index, loss = quantize(rows, codes, None, 2, 0.25, 0.1, True, False)
    a += 1
    b.mul_(2)
    assert torch.equal(a.detach(), codes[index[:6]] + 1)
    (a.sum() + b.sum() + 0 * loss).backward()
    assert torch.equal(rows.grad.cpu(), torch.tensor([[1.0]] * 6 + [[2.0]] * 6).expand(12, 5))


@pytest.mark.parametrize("rotation", [False, True])
def test_a_gradient_of_the_gradient(rotation: bool, device: str) -> None:
    codes = uniform(9, 5, dtype=torch.float32, seed=1).to(device)
    rows = uniform(12, 5, dtype=torch.float32).to(device).requires_grad_()
    parts, index, loss = quantize(rows, codes, None, 2, 0.25, 0.1, True, rotation)
    (grad,) = torch.autograd.grad(loss + torch.cat(parts).square().sum(), rows, create_graph=True)
    grad.square().sum().backward()
    wide = rows.detach().double().requires_grad_()
    arguments = codes.double(), index, None, 2, 0.4, "mean", rotation
    quantized, wanted = expected(wide, *arguments)
    (theirs,) = torch.autograd.grad(wanted + quantized.square().sum(), wide, create_graph=True)
    theirs.square().sum().backward()
    atol = rounding(torch.float32, 200, 100)
    close(grad.cpu(), theirs.cpu(), atol)
    close(rows.grad.cpu(), wide.grad.cpu(), atol)


def test_an_empty_batch(device: str) -> None:
    rows = torch.zeros(0, 5, device=device, requires_grad=True)
    codes = uniform(9, 5, dtype=torch.float32).to(device)
    parts, index, loss = quantize(rows, codes, None, 2, 0.25, 0.1, True, False)
    assert [len(part) for part in parts] == [0, 0]
    assert len(index) == 0
    loss.backward()
    assert loss.item() == 0
    assert rows.grad.shape == (0, 5)


def test_numbers_may_be_tensors(device: str) -> None:
    """As graphs of torch.compile pass them."""
    from mmvq_kernels.gpu.commitment import forward

    rows = uniform(12, 5, dtype=torch.float32).to(device)
    codes = uniform(9, 5, dtype=torch.float32, seed=1).to(device)
    own, cross = (torch.tensor(x, device=device) for x in (0.25, 0.125))
    plain = forward(rows, codes, None, 2, 0.25, 0.125, True)
    for a, b in zip(forward(rows, codes, None, 2, own, cross, True), plain, strict=True):
        assert torch.equal(a, b)


def test_the_gradient_reaches_what_was_used(device: str) -> None:
    """Features that need none, and outputs that nobody used, get none."""
    codes = uniform(9, 5, dtype=torch.float32, seed=1).to(device)

    def run(*needed: bool) -> tuple[list[Tensor], list[Tensor], Tensor]:
        z = [uniform(2, 3, 5, dtype=torch.float32, seed=i).to(device) for i in range(2)]
        z = [x.requires_grad_(need) for x, need in zip(z, needed, strict=True)]
        rows = torch.cat([x.detach().flatten(0, 1) for x in z])
        parts, _, loss = commitment.quantize(z, rows, codes, None, 0.25, 0.1, True, False)
        return z, parts, loss

    z, parts, _ = run(True, True)
    parts[1].sum().backward()
    assert z[0].grad is None
    assert torch.equal(z[1].grad.cpu(), torch.ones(2, 3, 5))
    z, parts, loss = run(True, False)
    assert [part.requires_grad for part in parts] == [True, False]
    loss.mul_(2).backward()  # in place, as a sum of losses may be
    assert z[0].grad is not None
    assert z[1].grad is None
