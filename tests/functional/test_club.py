"""CLUB's closed form against the loops over pairs.

ATOL: entries in [-1, 1] and variances of at least 1/e, so each term of a sum over D = 3 is below
4 e; at most B T D of them are averaged: (B + T + D + 8) roundings of 4 e D.
"""

from __future__ import annotations

import math

import pytest
import torch
from support import DTYPES, bools, close, rounding, strided, uniform, wide
from torch import Tensor

from mmvq import functional

B, T, D = 6, 4, 3
Triple = tuple[Tensor, Tensor, Tensor]


def atol(dtype: torch.dtype) -> float:
    return rounding(wide(dtype), B + T + D + 8, 4 * math.e * D)


def batch(dtype: torch.dtype = torch.float64) -> Triple:
    mu, logvar, y = (uniform(B, T, D, dtype=dtype, seed=i) for i in range(3))
    return mu, logvar, y


def loop(mu: Tensor, logvar: Tensor, y: Tensor, mask: Tensor) -> float:
    """Every valid sample against every sample valid at the same t."""
    excess = 0.0
    for i in range(B):
        for t in range(T):
            if mask[i, t]:
                error = [
                    ((mu[i, t] - y[j, t]).square() / logvar[i, t].exp()).sum().item()
                    for j in range(B)
                    if mask[j, t]
                ]
                own = ((mu[i, t] - y[i, t]).square() / logvar[i, t].exp()).sum().item()
                excess += (sum(error) / len(error) - own) / 2
    return excess / max(int(mask.sum()), 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(dtype: torch.dtype) -> None:
    triple = batch(dtype)
    bound = functional.club(*triple)
    assert bound.dtype == wide(dtype)
    close(bound, functional.club_ref(*(x.double() for x in triple)), atol(dtype))
    flat = tuple(x[:, 0] for x in triple)
    close(
        functional.club(*flat),
        functional.club_ref(*(x[:, :1].double() for x in triple)),
        atol(dtype),
    )


def test_masks_equal_the_loop() -> None:
    mu, logvar, y = batch()
    mask = bools(B, T)
    mask[:, 2] = False
    expected = loop(mu, logvar, y, mask)
    spoilt = [torch.where(mask[..., None], x, torch.nan).requires_grad_() for x in (mu, logvar, y)]
    bound = functional.club(*spoilt, mask)
    close(bound, expected, atol(mu.dtype))
    bound.backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in spoilt)


def test_one_negative_averages_to_all() -> None:
    """The B shifts of the batch bring every pair once."""
    triple = batch()
    shifts = [functional.club_shuffled(*triple, torch.arange(B).roll(s)) for s in range(B)]
    close(torch.stack(shifts).mean(), functional.club(*triple), atol(torch.float64))
    assert shifts[0] == 0


def test_one_negative_counts_where_both_are_valid() -> None:
    mu, logvar, y = batch()
    mask, order = bools(B, T), torch.arange(B).roll(1)
    terms = [
        (((mu[i, t] - y[i - 1, t]) ** 2 - (mu[i, t] - y[i, t]) ** 2) / logvar[i, t].exp()).sum() / 2
        for i in range(B)
        for t in range(T)
        if mask[i, t] and mask[i - 1, t]
    ]
    bound = functional.club_shuffled(
        mu, logvar, torch.where(mask[..., None], y, torch.nan), order, mask
    )
    close(bound, torch.stack(terms).mean(), atol(mu.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_likelihood_is_the_normal_density(dtype: torch.dtype) -> None:
    mu, logvar, y = batch(dtype)
    normal = torch.distributions.Normal(mu.double(), (logvar.double() / 2).exp())
    density = normal.log_prob(y.double()).sum(-1)
    out = functional.gaussian_log_likelihood(mu, logvar, y)
    assert out.dtype == wide(dtype)
    close(out, density.mean(), atol(dtype))
    mask = bools(B, T)
    masked = torch.where(mask[..., None], y, torch.nan)
    close(
        functional.gaussian_log_likelihood(mu, logvar, masked, mask),
        density[mask].mean(),
        atol(dtype),
    )
    at_the_mean = functional.gaussian_log_likelihood(mu, torch.zeros_like(mu), mu)
    close(at_the_mean, -D / 2 * math.log(2 * math.pi), atol(dtype))


def test_nothing_constant_and_strided() -> None:
    mu, logvar, y = batch()
    none = torch.zeros(B, T, dtype=torch.bool)
    order = torch.arange(B)
    for nothing in ((mu[:0], logvar[:0], y[:0], None), (mu, logvar, y, none)):
        assert functional.club(*nothing) == 0
        assert functional.club_shuffled(*nothing[:3], order[: len(nothing[0])], nothing[3]) == 0
        assert functional.gaussian_log_likelihood(*nothing) == 0
    assert functional.club(mu, logvar, y[:1].expand(B, T, D)).abs() <= atol(
        mu.dtype
    )  # nothing to tell apart
    close(
        functional.club(strided(mu), strided(logvar), strided(y)),
        functional.club(mu, logvar, y),
        atol(mu.dtype),
    )


def test_gradient() -> None:
    inputs = [x.requires_grad_() for x in batch()]
    mask, order = bools(B, T), torch.arange(B).roll(2)
    assert torch.autograd.gradcheck(lambda *x: functional.club(*x, mask), inputs)
    assert torch.autograd.gradcheck(lambda *x: functional.club(*x), inputs)
    assert torch.autograd.gradcheck(lambda *x: functional.club_shuffled(*x, order, mask), inputs)
    assert torch.autograd.gradcheck(lambda *x: functional.gaussian_log_likelihood(*x, mask), inputs)
