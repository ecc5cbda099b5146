"""The estimator over `functional.club`: shapes, masks, negatives, who gets a gradient."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from support import DTYPES, bools, uniform, wide
from torch import Tensor

from mmvq import CLUBEstimator
from mmvq.functional import club, club_penalty, club_shuffled, gaussian_log_likelihood

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
    module = estimator(negatives=negatives).to(dtype)
    x, y = batch(dtype) if timed else (part[:, 0] for part in batch(dtype))
    mask = bools(*x.shape[:-1]) if masked else None
    mu, logvar = module.posterior(x)
    assert mu.shape == logvar.shape == y.shape
    if negatives == "all":
        expected = club(mu, logvar, y, mask)
    else:
        order = torch.randperm(B, generator=torch.Generator().manual_seed(5))
        expected = club_shuffled(mu, logvar, y, order, mask)
    if mask is not None:  # what lies under a False is never read
        x, y = (torch.where(mask[..., None], part, torch.nan) for part in (x, y))
    bound = module(x, y, mask, generator=torch.Generator().manual_seed(5))
    assert bound.shape == ()
    assert bound.dtype == wide(dtype)
    # zeros for the padding change the shape of no product, only what its rows hold
    assert torch.equal(bound, expected)
    assert torch.equal(module.penalty(x, y, mask), club_penalty(mu, torch.nan_to_num(y), mask))
    likelihood = gaussian_log_likelihood(mu, logvar, torch.nan_to_num(y), mask)
    assert torch.equal(module.log_likelihood(x, y, mask), likelihood)
    assert torch.equal(module.learning_loss(x, y, mask), -likelihood)


@pytest.mark.parametrize("bound", [None, 1.0, 8.0])
def test_the_log_variance_keeps_its_bound(bound: float | None) -> None:
    module, x = estimator(logvar_bound=bound), batch()[0]
    with torch.no_grad():
        module.p_logvar[2].weight.mul_(1000)
    _, logvar = module.posterior(x)
    raw = module.p_logvar(x)
    assert raw.abs().max() > 8
    assert torch.equal(logvar, raw if bound is None else bound * (raw / bound).tanh())


def test_gradients_go_where_they_should() -> None:
    module = estimator()
    x, y = (part.requires_grad_() for part in batch())
    module.learning_loss(x, y).backward()
    assert x.grad is None
    assert y.grad is None
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    for objective in (module, module.penalty):
        gradients = torch.autograd.grad(objective(x, y), [x, y])
        assert all(gradient.any() for gradient in gradients)


def test_generator_state_and_copies() -> None:
    module = estimator(negatives="shuffled")
    x, y = batch()
    twice = [module(x, y, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*twice)
    torch.manual_seed(3)  # without a generator of its own, torch's
    assert torch.equal(module(x, y), twice[0])
    other = CLUBEstimator(X, Y, hidden_dim=8)
    other.load_state_dict(module.state_dict())
    for twin in (other, deepcopy(module)):
        assert torch.equal(twin.log_likelihood(x, y), module.log_likelihood(x, y))
    layers = [
        f"{net}.{i}.{kind}"
        for net in ("p_mu", "p_logvar")
        for i in (0, 2)
        for kind in ("weight", "bias")
    ]
    assert list(module.state_dict()) == layers
    assert "negatives='shuffled', logvar_bound=8.0" in repr(module)


@pytest.mark.parametrize("negatives", ["all", "shuffled"])
def test_nothing_is_zero_and_autocast_is_wide(negatives: Any) -> None:
    module = estimator(negatives=negatives)
    x, y = batch()
    assert module(x, y, torch.zeros(B, T, dtype=torch.bool)) == 0
    assert module(x[:0], y[:0]) == 0
    assert module.penalty(x, y, torch.zeros(B, T, dtype=torch.bool)) == 0
    assert module.penalty(x[:0], y[:0]) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x, y).dtype == torch.float32
        assert module.penalty(x, y).dtype == torch.float32
