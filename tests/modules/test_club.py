"""The estimator over `functional.club`: shapes, masks, negatives, who gets a gradient."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from support import DTYPES, bools, uniform, wide
from torch import Tensor

from mmvq import CLUBEstimator, functional

B, T, X, Y = 6, 5, 4, 3


def estimator(**options: Any) -> CLUBEstimator:
    torch.manual_seed(1)
    return CLUBEstimator(X, Y, hidden_dim=8, **options)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return uniform(B, T, X, dtype=dtype), uniform(B, T, Y, dtype=dtype, seed=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("negatives", ["all", "shuffled"])
@pytest.mark.parametrize("timed", [True, False], ids=["B T D", "B D"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
def test_is_the_function_of_its_posterior(
    dtype: torch.dtype, negatives: Any, timed: bool, masked: bool
) -> None:
    club = estimator(negatives=negatives).to(dtype)
    x, y = batch(dtype) if timed else (part[:, 0] for part in batch(dtype))
    mask = bools(*x.shape[:-1]) if masked else None
    mu, logvar = club.posterior(x)
    assert mu.shape == logvar.shape == y.shape
    if negatives == "all":
        expected = functional.club(mu, logvar, y, mask)
    else:
        order = torch.randperm(B, generator=torch.Generator().manual_seed(5))
        expected = functional.club_shuffled(mu, logvar, y, order, mask)
    if mask is not None:  # what lies under a False is never read
        x, y = (torch.where(mask[..., None], part, torch.nan) for part in (x, y))
    bound = club(x, y, mask, generator=torch.Generator().manual_seed(5))
    assert bound.shape == ()
    assert bound.dtype == wide(dtype)
    # zeros for the padding change the shape of no product, only what its rows hold
    assert torch.equal(bound, expected)
    likelihood = functional.gaussian_log_likelihood(mu, logvar, torch.nan_to_num(y), mask)
    assert torch.equal(club.log_likelihood(x, y, mask), likelihood)
    assert torch.equal(club.learning_loss(x, y, mask), -likelihood)


@pytest.mark.parametrize("bound", [None, 1.0, 8.0])
def test_the_log_variance_keeps_its_bound(bound: float | None) -> None:
    club = estimator(logvar_bound=bound)
    with torch.no_grad():
        club.p_logvar[2].weight.mul_(1000)
    _, logvar = club.posterior(batch()[0])
    raw = club.p_logvar(batch()[0])
    assert raw.abs().max() > 8
    if bound is None:
        assert torch.equal(logvar, raw)
    else:
        assert logvar.abs().max() <= bound
        assert torch.equal(logvar, bound * (raw / bound).tanh())


def test_gradients_go_where_they_should() -> None:
    club = estimator()
    x, y = (part.requires_grad_() for part in batch())
    club.learning_loss(x, y).backward()
    assert x.grad is None
    assert y.grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in club.parameters())
    club(x, y).backward()
    assert x.grad is not None
    assert y.grad is not None
    assert x.grad.abs().sum() > 0
    assert y.grad.abs().sum() > 0


def test_fitting_raises_the_likelihood_of_what_depends() -> None:
    """y is x / 2 + noise of deviation 0.1: ln q tends to -Y (ln 0.1 + ln(2 pi e) / 2) = 2.65."""
    club = CLUBEstimator(Y, Y, hidden_dim=32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, Y, generator=generator)
    y = x / 2 + 0.1 * torch.randn(2048, Y, generator=generator)
    optimiser = torch.optim.Adam(club.parameters(), 1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        club.learning_loss(x, y).backward()
        optimiser.step()
    entropy = Y * (math.log(0.1) + math.log(2 * math.pi * math.e) / 2)
    fitted = club.log_likelihood(x, y)
    # the mean of 2,048 ln q deviates by sqrt(Y / 2 / 2048) = 0.03; 454 parameters can fit noise
    # worth 454 / 2 / 2048 = 0.11
    assert -entropy - 0.5 < fitted < -entropy + 4 * 0.03 + 0.11
    apart = club(x, y[torch.randperm(2048, generator=generator)])
    assert club(x, y) > 10 * apart.abs()


def test_generator_state_and_copies() -> None:
    club = estimator(negatives="shuffled")
    x, y = batch()
    twice = [club(x, y, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*twice)
    other = CLUBEstimator(X, Y, hidden_dim=8)
    other.load_state_dict(club.state_dict())
    for twin in (other, deepcopy(club)):
        assert torch.equal(twin.log_likelihood(x, y), club.log_likelihood(x, y))
    layers = [
        f"{net}.{i}.{kind}"
        for net in ("p_mu", "p_logvar")
        for i in (0, 2)
        for kind in ("weight", "bias")
    ]
    assert list(club.state_dict()) == layers
    assert "negatives='shuffled', logvar_bound=8.0" in repr(club)


@pytest.mark.parametrize("negatives", ["all", "shuffled"])
def test_nothing_is_zero_and_autocast_is_wide(negatives: Any) -> None:
    club = estimator(negatives=negatives)
    x, y = batch()
    assert club(x, y, torch.zeros(B, T, dtype=torch.bool)) == 0
    assert club(x[:0], y[:0]) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert club(x, y).dtype == torch.float32
