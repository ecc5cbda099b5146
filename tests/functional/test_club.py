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

from mmvq.functional import (
    club,
    club_penalty,
    club_penalty_ref,
    club_ref,
    club_shuffled,
    gaussian_log_likelihood,
)

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


def correlations(mu: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """rho of each dimension over the valid rows, each minus the mean of the valid rows at its t."""
    rows = [
        torch.stack([v[mask[:, t], t] - v[mask[:, t], t].mean(0) for v in (mu, y)])
        for t in range(mask.shape[1])
        if mask[:, t].any()
    ]
    mu, y = torch.cat(rows, 1)
    return (mu * y).sum(0) / (mu.square().sum(0) * y.square().sum(0)).sqrt()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_the_penalty_is_the_mean_of_squared_correlations(dtype: torch.dtype, masked: bool) -> None:
    mask = some_mask() if masked else torch.ones(B, T) > 0
    mu, _, y = batch(dtype)
    expected = correlations(mu.double(), y.double(), mask).square().mean()
    spoilt = [torch.where(mask[..., None], v, torch.nan).requires_grad_() for v in (mu, y)]
    value = club_penalty(*spoilt, mask if masked else None)
    assert value.dtype == wide(dtype)
    assert 0.01 < expected < 0.9
    close(value, expected, atol(dtype))
    value.backward()
    for v in spoilt:
        assert v.grad is not None
        assert v.grad.isfinite().all()
        assert (v.grad[~mask] == 0).all()
    if not masked:
        close(club_penalty_ref(mu.double(), y.double()), expected, atol(torch.float64))


def test_the_penalty_grows_with_eq_5_of_a_refitted_q() -> None:
    """One scale a dimension, an offset for each t, and the variance of the residuals."""
    mu, _, y = batch()
    mu, centred = mu - mu.mean(0), y - y.mean(0)
    fit = (mu * centred).sum((0, 1)) / mu.square().sum((0, 1)) * mu
    logvar = (centred - fit).square().mean((0, 1)).log().expand_as(y)
    share = correlations(mu, y, torch.ones(B, T) > 0).square()
    bound = club(fit + y.mean(0), logvar, y)
    close(bound, (share / (1 - share)).sum(), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scale_and_offset_of_mean_and_sample_do_not_matter(dtype: torch.dtype) -> None:
    """Offsets of 8 deviations cost 3 bits: 8 times the tolerance. Offsets may differ with t."""
    mu, _, y = batch(dtype)
    value = club_penalty(mu, y)
    for scale in (1e-6, 3.0, -1e6):
        close(club_penalty(scale * mu, y), value, atol(dtype))
        close(club_penalty(mu, scale * y), value, atol(dtype))
    offset = 8 * uniform(T, D, dtype=dtype, seed=7)
    close(club_penalty(mu + offset, y), value, 8 * atol(dtype))
    close(club_penalty(mu, y + offset), value, 8 * atol(dtype))


def test_the_penalty_rests_where_nothing_correlates_and_grows_with_the_correlation() -> None:
    signal, noise = torch.tensor([1.0, -1, 1, -1]), torch.tensor([1.0, 1, -1, -1])
    y = noise[:, None].clone().requires_grad_()
    value = club_penalty(signal[:, None], y)
    value.backward()
    assert value == 0
    assert y.grad is not None
    assert (y.grad == 0).all()
    for rho in (-1.0, -0.5, 0.1, 0.9, 1.0):
        mixed = rho * signal + math.sqrt(1 - rho**2) * noise
        close(club_penalty(signal[:, None], mixed[:, None]), rho**2, atol(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("constant", ["mu", "y", "both"])
def test_a_constant_explains_nothing_and_gets_no_gradient(
    dtype: torch.dtype, constant: str
) -> None:
    """Also where rounding makes the mean of equal numbers another number."""
    mu, _, y = batch(dtype)
    flat = (1000 * uniform(T, D, dtype=dtype, seed=3)).expand(B, T, D)
    mu, y = flat if constant != "y" else mu, flat if constant != "mu" else y
    inputs = [v.clone().requires_grad_() for v in (mu, y)]
    value = club_penalty(*inputs)
    value.backward()
    assert value == 0
    for v in inputs:
        assert v.grad is not None
        assert (v.grad == 0).all()


def test_the_penalty_of_one_clip_and_of_nothing_is_zero() -> None:
    mu, _, y = batch()
    none = torch.zeros(B, T, dtype=torch.bool)
    one = none.clone()
    one[2] = True
    pair = [v.requires_grad_() for v in (mu, y)]
    cases = [(mu[:0], y[:0], None), (mu[:1], y[:1], None), (mu, y, one), (mu, y, none)]
    for a, b, mask in cases:
        value = club_penalty(a, b, mask)
        assert value == 0
        for gradient in torch.autograd.grad(value, pair):
            assert (gradient == 0).all()


def test_without_time_it_is_that_of_one_segment() -> None:
    mask = bools(B)
    mu, _, y = batch()
    assert torch.equal(club_penalty(mu[:, 0], y[:, 0]), club_penalty(mu[:, :1], y[:, :1]))
    masked = club_penalty(mu[:, 0], y[:, 0], mask), club_penalty(mu[:, :1], y[:, :1], mask[:, None])
    assert torch.equal(*masked)
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
    close(club_penalty(strided(mu), strided(y)), club_penalty(mu, y), atol(mu.dtype))


def test_gradient() -> None:
    inputs = [x.requires_grad_() for x in batch()]
    mask, order = bools(B, T), torch.arange(B).roll(2)
    assert torch.autograd.gradcheck(lambda *x: club(*x, mask), inputs)
    assert torch.autograd.gradcheck(lambda *x: club_shuffled(*x, order, mask), inputs)
    assert torch.autograd.gradcheck(lambda mu, _, y: club_penalty(mu, y, mask), inputs)
    assert torch.autograd.gradcheck(lambda *x: gaussian_log_likelihood(*x, mask), inputs)


@pytest.mark.parametrize("scale", [1e-15, 1e-9, 1e9, 1e15])
def test_the_gradient_of_the_penalty_is_finite_at_any_scale(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    mu, y = torch.randn(2, 32, 5, 4, generator=generator)
    y = y + mu
    plain = club_penalty(mu, y)
    mu.requires_grad_()
    scaled = (scale * y).requires_grad_()
    value = club_penalty(mu, scaled)
    value.backward()
    torch.testing.assert_close(value, plain, atol=1e-6, rtol=0)
    for x in (mu, scaled):
        assert x.grad is not None
        assert x.grad.isfinite().all()
