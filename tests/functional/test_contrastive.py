"""InfoNCE against the loop.

ATOL: entries in [-1, 1], D = 4, temperature 0.5: scores up to 8, off by (D + 2) roundings of 8, and
the log-sum-exp of N by 2 N more; the factor 2 is for the two terms of each loss.
"""

from __future__ import annotations

import math

import pytest
import torch
from support import DTYPES, bools, close, rounding, strided, uniform
from torch import Tensor

from mmvq.functional import info_nce, info_nce_ref, similarities, top1_hits

N, D = 7, 4


def atol(dtype: torch.dtype) -> float:
    return 2 * rounding(dtype, D + 2 + 2 * N, 8)


def pair(*lead: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return uniform(*lead, N, D, dtype=dtype), uniform(*lead, N, D, dtype=dtype, seed=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_equals_the_reference(dtype: torch.dtype, temperature: float) -> None:
    q, k = pair(dtype=dtype)
    expected = info_nce_ref(q.double(), k.double(), temperature)
    loss = info_nce(q, k, temperature=temperature)
    scores = similarities(q, k, temperature=temperature)
    assert loss.dtype == scores.dtype == torch.promote_types(dtype, torch.float32)
    close(loss, expected, atol(loss.dtype))
    close(scores, q.double() @ k.double().T / temperature, atol(loss.dtype))


@pytest.mark.parametrize("normalize", [False, True])
def test_scores_beyond_float16_are_finite(normalize: bool) -> None:
    q, k = ((300 * x).half() for x in pair())
    expected = info_nce(q.double(), k.double(), normalize=normalize)
    size = 1 if normalize else D * 300**2
    tolerance = 2 * rounding(torch.float32, D + 2 + 2 * N, size)
    close(info_nce(q, k, normalize=normalize), expected, tolerance)
    q, k = q.float(), k.float()  # autocast asks for the same products in float16
    with torch.autocast("cpu", torch.float16):
        close(info_nce(q, k, normalize=normalize), expected, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [2.0**-60, 2.0**-30, 1.0, 2.0**30, 2.0**60])
def test_a_cosine_has_no_scale(dtype: torch.dtype, scale: float) -> None:
    """Powers of two round nothing; a gradient is as much larger as its vector is smaller."""
    q, k = pair(dtype=dtype)
    at_one, at_scale = ((s * q).requires_grad_() for s in (1.0, scale))
    losses = [info_nce(x, k, normalize=True) for x in (at_one, at_scale)]
    assert torch.equal(*losses)
    grads = [torch.autograd.grad(*each)[0] for each in zip(losses, (at_one, at_scale), strict=True)]
    assert torch.equal(grads[0], grads[1] * scale)


def test_a_vector_of_zeros_has_cosine_0_and_no_gradient() -> None:
    q, k = pair(dtype=torch.float32)
    q[2] = 0
    q.requires_grad_()
    assert (similarities(q, k, normalize=True)[2] == 0).all()
    (grad,) = torch.autograd.grad(info_nce(q, k, normalize=True), q)
    assert (grad[2] == 0).all()
    assert grad.isfinite().all()


def test_leading_dimensions_are_problems_of_their_own() -> None:
    q, k = pair(2, 3)
    each = torch.stack([info_nce_ref(q[i, j], k[i, j]) for i in range(2) for j in range(3)])
    close(info_nce(q, k), each.mean(), atol(q.dtype))
    rows = info_nce(q, k, reduction="none")
    assert rows.shape == (2, 3, N)
    close(rows.mean(-1).flatten(), each, atol(q.dtype))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_mask_is_the_problem_without_those_pairs(symmetric: bool, normalize: bool) -> None:
    q, k = pair(2)
    mask = bools(2, N)
    rows = []
    for i in range(2):
        a, b = q[i][mask[i]], k[i][mask[i]]
        if normalize:
            a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
        both = info_nce_ref(a, b, 0.5), info_nce_ref(b, a, 0.5)
        rows.append((sum(both) / 2 if symmetric else both[0]) * len(a))
    spoilt_q, spoilt_k = (
        torch.where(mask[..., None], x, torch.nan).requires_grad_() for x in (q, k)
    )
    loss = info_nce(
        spoilt_q, spoilt_k, mask=mask, temperature=0.5, symmetric=symmetric, normalize=normalize
    )
    close(loss, sum(rows) / mask.sum(), atol(q.dtype))
    loss.backward()
    for x in (spoilt_q, spoilt_k):  # what lies under a False reaches no gradient either
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert (x.grad[~mask] == 0).all()


def test_one_mask_for_all_problems() -> None:
    q, k = pair(2)
    mask = bools(N)
    once = info_nce(q, k, mask=mask)
    close(once, info_nce(q, k, mask=mask.expand(2, N)), atol(q.dtype))


def test_analytic() -> None:
    q, _ = pair()
    close(info_nce(q, torch.zeros_like(q)), math.log(N), atol(q.dtype))
    corner = 60 * torch.eye(N, dtype=torch.float64)
    assert 0 <= info_nce(corner, corner) <= N * math.exp(-3600)
    assert info_nce(q[:1], q[:1]) == 0
    assert info_nce(q[:0], q[:0]) == 0
    assert info_nce(q, q, mask=torch.zeros(N, dtype=torch.bool)) == 0


@pytest.mark.parametrize("normalize", [False, True])
def test_a_hit_is_the_argmax(normalize: bool) -> None:
    q, k = pair(2)
    mask = bools(2, N)
    hits = top1_hits(q, k, mask=mask, normalize=normalize)
    if normalize:
        k = k / k.norm(dim=-1, keepdim=True)
    for i in range(2):
        valid = [j for j in range(N) if mask[i, j]]
        for j in range(N):
            best = max(valid, key=lambda c: (q[i, j] @ k[i, c]).item())
            assert hits[i, j].item() is (j in valid and best == j)
    perfect = torch.eye(N)
    assert top1_hits(perfect, perfect).all()
    assert not top1_hits(perfect, perfect.roll(1, 0)).any()
    assert top1_hits(q[:, :0], k[:, :0]).shape == (2, 0)


def test_strides_and_gradient() -> None:
    q, k = pair(2)
    close(info_nce(strided(q), strided(k)), info_nce(q, k), atol(q.dtype))
    mask = bools(2, N)
    inputs = [x.requires_grad_() for x in (q, k)]
    for options in ({}, {"mask": mask, "normalize": True}, {"mask": mask, "symmetric": True}):
        assert torch.autograd.gradcheck(lambda a, b, o=options: info_nce(a, b, **o), inputs)
