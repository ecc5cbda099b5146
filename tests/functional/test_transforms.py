"""`torch.func` and `torch.vmap`: a function of a batch is the function of each of its slices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import bools, close, rounding, uniform
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap

from mmvq import CLUBEstimator, CrossCPC, MultiModalEMAQuantizer
from mmvq.functional import (
    aligned_partner,
    club,
    club_penalty,
    club_shuffled,
    code_matching,
    code_probabilities,
    code_statistics,
    commitment,
    cross_attend,
    gaussian_log_likelihood,
    info_nce,
    nearest_code,
    rotate,
    straight_through,
    top1_hits,
)

V, B, T, D, L = 3, 4, 5, 6, 7
# sums of at most B T D products of entries below 1, then a quotient and an exponential
ATOL = rounding(torch.float64, 4 * B * T * D, 4)

X, Y, Z = (uniform(V, B, T, D, seed=seed) for seed in (1, 2, 3))
CODES, MASK = uniform(V, L, D, seed=4), bools(V, B, T, seed=5)
INDICES = torch.randint(-1, L, (V, B * T), generator=torch.Generator().manual_seed(6))


def two(loss: Callable[..., Tensor], *others: object) -> Callable[..., Tensor]:
    """A loss of named modalities as one of two tensors and a mask."""
    return lambda a, b, mask: loss({"a": a, "b": b}, *others, {"a": mask, "b": mask})


Case = tuple[Callable[..., Tensor], tuple[Tensor, ...]]
CASES: dict[str, Case] = {
    "nearest_code": (nearest_code, (X, CODES)),
    "nearest_code in float32": (nearest_code, (X.float(), CODES.float())),
    "nearest_code of one codebook": (lambda x: nearest_code(x, CODES[0]), (X,)),
    "code_statistics": (
        lambda x, i: torch.cat([y.flatten() for y in code_statistics(x, i, L)]),
        (X.flatten(1, 2), INDICES),
    ),
    "code_probabilities": (code_probabilities, (X, CODES, MASK)),
    "code_matching": (two(code_matching, CODES[0]), (X, Y, MASK)),
    "info_nce": (lambda a, b, m: info_nce(a, b, mask=m, symmetric=True), (X, Y, MASK)),
    "info_nce of cosines": (lambda a, b: info_nce(a, b, normalize=True), (X, Y)),
    "top1_hits": (lambda a, b, m: top1_hits(a, b, mask=m), (X, Y, MASK)),
    "club": (club, (X, Y, Z, MASK)),
    "club_penalty": (club_penalty, (X, Y, MASK)),
    "club_shuffled": (
        lambda mu, v, y, m: club_shuffled(mu, v, y, torch.arange(B).flip(0), m),
        (X, Y, Z, MASK),
    ),
    "gaussian_log_likelihood": (gaussian_log_likelihood, (X, Y, Z, MASK)),
    "commitment": (two(commitment, {"a": Y[0], "b": X[0]}), (X, Y, MASK)),
    "straight_through": (straight_through, (X, Y)),
    "rotate": (rotate, (X, Y)),
    "cross_attend": (lambda z, o, m: cross_attend(z, {"o": o}, {"o": m}), (X, Y, MASK)),
    "aligned_partner": (
        lambda z, o, m: aligned_partner(z, {"o": o}, {"o": m}),
        (X, Y, MASK),
    ),
}
DIFFERENTIABLE = [n for n in CASES if not n.startswith(("nearest", "top1_hits", "code_stat"))]


def each(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([function(*slices) for slices in zip(*tensors, strict=True)])


@pytest.mark.parametrize("name", CASES)
def test_vmap_is_a_loop(name: str) -> None:
    function, tensors = CASES[name]
    result, expected = vmap(function)(*tensors), each(function, tensors)
    assert result.dtype == expected.dtype
    close(result, expected, ATOL)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_slices_are_those_of_autograd(name: str) -> None:
    function, tensors = CASES[name]

    def scalar(*slices: Tensor) -> Tensor:
        return (function(*slices) * 1.5).sum()

    def by_autograd(*slices: Tensor) -> Tensor:
        leaf = slices[0].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(scalar(leaf, *slices[1:]), leaf)
        return gradient

    close(vmap(grad(scalar))(*tensors), each(by_autograd, tensors), ATOL)


def test_jacobians_of_the_code_distribution_in_features_and_codes() -> None:
    for argument, x in enumerate((X[0], CODES[0])):

        def of(y: Tensor, argument: int = argument) -> Tensor:
            return code_probabilities(*((y, CODES[0]) if argument == 0 else (X[0], y)))

        expected = torch.autograd.functional.jacobian(of, x)
        close(jacrev(of)(x), expected, ATOL)
        assert expected.abs().max() > 0.01


def test_the_curvature_of_the_commitment_is_constant() -> None:
    """beta |z - e|^2 / (B T D): twice beta / (B T D) for each element."""
    curvature = jacrev(jacrev(lambda z: commitment({"a": z}, {"a": Y[0]})))(X[0])
    size = B * T * D
    close(curvature.reshape(size, size), 0.5 / size * torch.eye(size, dtype=torch.float64), ATOL)


def trained() -> MultiModalEMAQuantizer:
    quantizer = MultiModalEMAQuantizer(D, L, ("a", "b")).double()
    quantizer({"a": X[0], "b": Y[0]})
    return quantizer


@pytest.mark.parametrize("how", ["eval", "freeze"])
def test_a_quantizer_that_does_not_write_can_be_transformed(how: str) -> None:
    quantizer = trained().train(how == "freeze")

    def loss(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        out = quantizer({"a": a, "b": b}, {"a": mask}, freeze=True)
        return out.loss + out.quantized["a"].square().sum()

    close(vmap(loss)(X, Y, MASK), each(loss, (X, Y, MASK)), ATOL)
    close(vmap(grad(loss))(X, Y, MASK), each(grad(loss), (X, Y, MASK)), ATOL)
    assert torch.equal(vmap(quantizer.encode)(X), quantizer.encode(X))
    assert torch.equal(vmap(quantizer.decode)(INDICES), quantizer.decode(INDICES))


def test_a_training_step_cannot_be_differentiated_as_a_function() -> None:
    """It writes state that the transform does not know; `freeze=True` does not."""
    quantizer = trained()
    with pytest.raises(RuntimeError, match="in-place"):
        grad(lambda a: quantizer({"a": a}).loss)(X[0])


def test_functional_call_moves_the_state_it_was_given() -> None:
    quantizer = trained()
    own = {name: x.clone() for name, x in quantizer.named_buffers()}
    given = {name: x.clone() for name, x in own.items()}
    functional_call(quantizer, given, ({"a": X[1], "b": Y[1]},))
    assert all(torch.equal(x, own[name]) for name, x in quantizer.named_buffers())
    quantizer({"a": X[1], "b": Y[1]})
    assert all(torch.equal(x, given[name]) for name, x in quantizer.named_buffers())


def test_gradients_for_each_sample_of_the_learned_parts() -> None:
    estimator = CLUBEstimator(D, D, 8).double()
    weights = dict(estimator.named_parameters())

    def bound(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return functional_call(estimator, weights, (x, y))

    batched = vmap(grad(bound), in_dims=(None, 0, 0))(weights, X, Y)
    for name, gradient in batched.items():
        loop = torch.stack([grad(bound)(weights, x, y)[name] for x, y in zip(X, Y, strict=True)])
        close(gradient, loop, ATOL)
    cpc = CrossCPC(D, ("a", "b")).double()

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(cpc, weights, ({"a": X[0], "b": Y[0]},), {"start": 2}).loss

    found = grad(loss)(dict(cpc.named_parameters()))
    cpc({"a": X[0], "b": Y[0]}, start=2).loss.backward()
    for name, weight in cpc.named_parameters():
        close(found[name], weight.grad, ATOL)
