"""CLUB's closed form against the loop over pairs.

ATOL: entries in [-1, 1] and variances of at least 1/e, so each term of a sum over D = 3 is below
4 e; at most B T D of them are averaged: (B + T + D + 8) roundings of 4 e D.
"""

from __future__ import annotations

import math

import pytest
import torch
from support import DTYPES, bools, close, rounding, strided, uniform, wide
from torch import Tensor

from mmvq.functional import club, club_ref, club_shuffled, gaussian_log_likelihood

B, T, D = 6, 4, 3


def atol(dtype: torch.dtype) -> float:
    return rounding(wide(dtype), B + T + D + 8, 4 * math.e * D)


def batch(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [uniform(B, T, D, dtype=dtype, seed=i) for i in range(3)]


def some_mask() -> Tensor:
    mask = bools(B, T)
    mask[:, 2] = False
    return mask


def loop(mu: Tensor, logvar: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Every valid sample against every sample valid at the same t."""
    error = (mu[:, None] - y).square() / logvar[:, None].exp()  # [B, B, T, D]
    terms = [
        (error[i, mask[:, t], t].mean(0) - error[i, i, t]).sum() / 2
        for i, t in mask.nonzero().tolist()
    ]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_the_closed_form_is_the_loop_over_pairs(dtype: torch.dtype, masked: bool) -> None:
    mask = some_mask() if masked else torch.ones(B, T) > 0
    expected = loop(*(x.double() for x in batch(dtype)), mask)
    spoilt = [torch.where(mask[..., None], x, torch.nan).requires_grad_() for x in batch(dtype)]
    bound = club(*spoilt, mask if masked else None)
    assert bound.dtype == wide(dtype)
    close(bound, expected, atol(dtype))
    bound.backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in spoilt)
    if not masked:
        close(club_ref(*(x.double() for x in batch(dtype))), expected, atol(torch.float64))


def test_without_time_it_is_that_of_one_segment() -> None:
    mask = bools(B)
    flat, timed = [x[:, 0] for x in batch()], [x[:, :1] for x in batch()]
    assert torch.equal(club(*flat), club(*timed))
    assert torch.equal(club(*flat, mask), club(*timed, mask[:, None]))


def test_one_negative_counts_where_both_are_valid() -> None:
    mu, logvar, y = batch()
    mask, order = bools(B, T), torch.arange(B).roll(1)
    terms = [
        (((mu[i, t] - y[i - 1, t]) ** 2 - (mu[i, t] - y[i, t]) ** 2) / logvar[i, t].exp()).sum() / 2
        for i, t in (mask & mask.roll(1, 0)).nonzero().tolist()
    ]
    bound = club_shuffled(mu, logvar, torch.where(mask[..., None], y, torch.nan), order, mask)
    close(bound, torch.stack(terms).mean(), atol(mu.dtype))
    assert club_shuffled(mu, logvar, y, torch.arange(B)) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_likelihood_is_the_normal_density(dtype: torch.dtype) -> None:
    mu, logvar, y = batch(dtype)
    normal = torch.distributions.Normal(mu.double(), (logvar.double() / 2).exp())
    density = normal.log_prob(y.double()).sum(-1)
    out = gaussian_log_likelihood(mu, logvar, y)
    assert out.dtype == wide(dtype)
    close(out, density.mean(), atol(dtype))
    mask = bools(B, T)
    masked = torch.where(mask[..., None], y, torch.nan)
    close(gaussian_log_likelihood(mu, logvar, masked, mask), density[mask].mean(), atol(dtype))


def test_nothing_constant_and_strided() -> None:
    mu, logvar, y = batch()
    none, order = torch.zeros(B, T, dtype=torch.bool), torch.arange(B).roll(1)
    for triple, mask, negatives in ((batch(), none, order), ([x[:0] for x in batch()], None, [])):
        assert club(*triple, mask) == 0
        assert club_shuffled(*triple, torch.as_tensor(negatives).long(), mask) == 0
        assert gaussian_log_likelihood(*triple, mask) == 0
    assert club(mu, logvar, y[:1].expand(B, T, D)).abs() <= atol(mu.dtype)  # nothing to tell apart
    loose = club(strided(mu), strided(logvar), strided(y))
    close(loose, club(mu, logvar, y), atol(mu.dtype))


def test_gradient() -> None:
    inputs = [x.requires_grad_() for x in batch()]
    mask, order = bools(B, T), torch.arange(B).roll(2)
    assert torch.autograd.gradcheck(lambda *x: club(*x, mask), inputs)
    assert torch.autograd.gradcheck(lambda *x: club_shuffled(*x, order, mask), inputs)
    assert torch.autograd.gradcheck(lambda *x: gaussian_log_likelihood(*x, mask), inputs)
