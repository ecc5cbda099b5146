"""CLUB: one negative averages to all, and the bound is the one that theory gives.

For d pairs of Gaussians with correlation rho, I = -d/2 ln(1 - rho^2), and CLUB under
q = N(a x, v) is d a rho / v, which for the exact conditional is d rho^2 / (1 - rho^2): a bound, not
I itself. With the pair i = i among the negatives it is (1 - 1/B) of that.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties.strategies import Draw, draws, randn
from support import close
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmvq import CLUBEstimator
from mmvq.functional import club, club_penalty, club_shuffled

DIMENSIONS, BATCH = 20, 64
NATS = (2, 4, 6, 8, 10)


def correlation(nats: float, dimensions: int = DIMENSIONS) -> float:
    return math.sqrt(1 - math.exp(-2 * nats / dimensions))


def gaussians(rho: float, *shape: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, noise = (torch.randn(*shape, generator=generator) for _ in range(2))
    return x, rho * x + math.sqrt(1 - rho**2) * noise


@given(draw=draws())
def test_one_negative_averages_to_all(draw: Draw) -> None:
    """The B rotations of the batch meet each pair once: Eq. 5 in full."""
    z = draw.features(["mu", "logvar", "y"])
    triple = z["mu"] + 2, z["logvar"].clamp(-2, 2), z["y"] - 3  # not centred
    rotations = [torch.arange(draw.B).roll(k) for k in range(draw.B)]
    drawn = torch.stack([club_shuffled(*triple, order) for order in rotations])
    close(drawn.mean(), club(*triple), 1e-10)


@given(draw=draws(), scale=st.sampled_from((-30.0, 0.01, 5.0)), offset=st.floats(-9, 9))
def test_the_penalty_is_a_share_that_knows_no_unit_and_no_order(
    draw: Draw, scale: float, offset: float
) -> None:
    """Scale and offset of either, rows under a False, and the order of clips change nothing."""
    z, mask = draw.features(["mu", "y", "junk"]), draw.masks(["y"])["y"]
    mu, y = z["mu"], z["y"]
    value = club_penalty(mu, y, mask)
    assert 0 <= value <= 1 + 1e-12
    order = torch.randperm(draw.B, generator=torch.Generator().manual_seed(draw.seed))
    spoilt = [torch.where(mask[..., None], v, 1e6 * z["junk"]) for v in (mu, y)]
    for other in (
        club_penalty(scale * mu + offset, y, mask),
        club_penalty(mu, scale * y + offset, mask),
        club_penalty(mu[order], y[order], mask[order]),
        club_penalty(*spoilt, mask),
        club_penalty(y, mu, mask),
    ):
        close(other, value, 1e-8)


def test_independent_rows_have_what_a_fit_to_few_of_them_finds() -> None:
    """1 / (T (B - 1)) on average; 4,000 draws of a variance of at most twice its square: 2.3%."""
    mu, y = randn(2, 6, 3, 4000, seed=1)
    assert float(club_penalty(mu, y)) == pytest.approx(1 / (3 * 5), rel=0.1)


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_no_tensor_of_pairs_is_made() -> None:
    B, T, D = 101, 3, 5
    x = randn(B, T, D, seed=0, dtype=torch.float32)
    module = CLUBEstimator(D, D, hidden_dim=D)
    with Largest() as largest:
        module(x, x).backward()
    assert largest.elements == B * T * D
    with Largest() as largest:
        module.penalty(x, x).backward()
    assert largest.elements == 2 * B * T * D  # mean and sample in one


@pytest.mark.parametrize("nats", NATS)
@pytest.mark.parametrize("slope", ["exact", 0.3])
def test_an_injected_linear_q_gives_the_value_of_theory(nats: int, slope: Any) -> None:
    """2000 batches of 64, the batches along T. The gate is 2%; the standard error, below 0.2% even
    for 2 nats, allows 0.8%, which also tells the mean with the pair i = i from the one without.
    """
    rho = correlation(nats)
    a, v = (rho, 1 - rho**2) if slope == "exact" else (slope, 0.5)
    x, y = gaussians(rho, BATCH, 2000, DIMENSIONS, generator=torch.Generator().manual_seed(nats))
    expected = DIMENSIONS * a * rho / v
    assert expected >= nats or slope != "exact"
    value = club(a * x, torch.full_like(x, math.log(v)), y)
    assert float(value) == pytest.approx((1 - 1 / BATCH) * expected, rel=0.008)
    order = torch.arange(BATCH).roll(1)  # no pair i = i, but noisier
    alone = club_shuffled(a * x, torch.full_like(x, math.log(v)), y, order)
    assert float(alone) == pytest.approx(expected, rel=0.02)


def test_independent_variables_have_none() -> None:
    """Under the exact q = N(0, 1) every batch gives 0 up to rounding; under another slope the mean
    of 2000 batches does: its standard error is below 0.3 sqrt(2 * 20 / 128000) = 0.006.
    """
    x, y = gaussians(0.0, BATCH, 2000, DIMENSIONS, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros_like(x)
    single = [club(zero[:, t], zero[:, t], y[:, t]) for t in range(20)]
    # 20 terms of about 1, each the difference of two means over 64.
    assert max(abs(float(value)) for value in single) < 20 * 64 * torch.finfo(x.dtype).eps
    assert abs(float(club(zero, zero, y))) < 0.05
    assert abs(float(club(0.3 * x, zero, y))) < 0.05


@pytest.mark.parametrize("nats", [NATS[0], NATS[-1]])
def test_a_trained_q_comes_within_a_tenth_and_stays_a_bound(nats: int) -> None:
    """Hidden width 256, 600 steps; then 200 fresh batches, whose mean is off by 0.5% at most."""
    rho, generator = correlation(nats), torch.Generator().manual_seed(nats)
    torch.manual_seed(nats)
    module = CLUBEstimator(DIMENSIONS, DIMENSIONS, hidden_dim=256)
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-3)
    for _ in range(600):
        loss = module.learning_loss(*gaussians(rho, 128, DIMENSIONS, generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        value = float(module(*gaussians(rho, BATCH, 200, DIMENSIONS, generator=generator)))
    assert value == pytest.approx((1 - 1 / BATCH) * DIMENSIONS * rho**2 / (1 - rho**2), rel=0.1)
    assert value >= nats


@pytest.mark.parametrize("objective", ["forward", "penalty"])
def test_minimising_it_removes_the_information(objective: str) -> None:
    """x = W u sees y (1.58 nats) or noise, whatever W says; I(x; y) is known for any W."""
    rho, generator = correlation(1.58, 2), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    mixing = nn.Parameter(torch.eye(2, 4))
    module = CLUBEstimator(2, 2, hidden_dim=32)
    fit = torch.optim.Adam(module.parameters(), lr=3e-3)
    encode = torch.optim.Adam([mixing], lr=2e-2)

    def sample() -> tuple[Tensor, Tensor]:
        signal, y = gaussians(rho, 128, 2, generator=generator)
        u = torch.cat([signal, torch.randn(128, 2, generator=generator)], 1)
        return u @ nn.functional.normalize(mixing, dim=1).T, y

    def information() -> float:
        W = nn.functional.normalize(mixing.detach(), dim=1).double()
        covariance, cross = W @ W.T, rho * W[:, :2]
        rest = covariance - cross @ cross.T
        return float(torch.logdet(covariance) - torch.logdet(rest)) / 2

    assert information() == pytest.approx(1.58, abs=1e-6)
    for _ in range(300):
        for _ in range(3):
            fit.zero_grad()
            module.learning_loss(*sample()).backward()
            fit.step()
        encode.zero_grad()
        getattr(module, objective)(*sample()).backward()
        encode.step()
    assert information() < 0.15
