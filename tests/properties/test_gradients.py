"""Where gradients go: through the choice of a code, and from each term to its own inputs only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties.strategies import EPS, NAMES, Draw, draws, every_wiring, randn
from support import close
from torch import Tensor

from mmvq import CLUBEstimator, CrossCPC, CrossModalCodeMatchingLoss, CrossModalCommitmentLoss
from mmvq.functional import rotate


def leaves(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().clone().requires_grad_() for name, x in batch.items()}


def gradient(value: Tensor, *inputs: Tensor, weight: Tensor | None = None) -> list[Tensor]:
    """The gradient for each input, zeros where none arrives."""
    found = torch.autograd.grad(value, inputs, weight, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


@every_wiring
@given(draw=draws())
def test_straight_through_is_the_identity(names: Sequence[str], partner: Any, draw: Draw) -> None:
    """In float64 to the bit: for its own valid features; none for masked ones or for others."""
    module = draw.quantizer(names, partner=partner)
    z, masks = leaves(draw.features(names)), draw.masks(names)
    out = module(z, masks)
    for a in names:
        weight = randn(*z[a].shape, seed=draw.seed)
        for b, found in zip(
            names, gradient(out.quantized[a], *z.values(), weight=weight), strict=True
        ):
            reached = masks[a][..., None] & (a == b)
            assert torch.equal(found, torch.where(reached, weight, 0))


@every_wiring
@given(draw=draws())
def test_rotation_reaches_only_its_own_valid_features(
    names: Sequence[str], partner: Any, draw: Draw
) -> None:
    module = draw.quantizer(names, partner=partner, gradient="rotation")
    z, masks = leaves(draw.features(names)), draw.masks(names)
    out = module(z, masks)
    before = draw.codes()
    for a in names:
        found = dict(zip(names, gradient(out.quantized[a].sum(), *z.values()), strict=True))
        expected = rotate(z[a], before[out.indices[a].clamp(min=0)])
        (own,) = gradient(torch.where(masks[a][..., None], expected, 0).sum(), z[a])
        assert torch.equal(found.pop(a), own)
        assert not any(g.any() for g in found.values())


@every_wiring
@given(
    draw=draws(), cross_ratio=st.sampled_from((0.0, 0.5, 2.0)), beta=st.sampled_from((0.25, 1.0))
)
def test_commitment_pulls_each_feature_to_its_codes(
    names: Sequence[str], partner: Any, draw: Draw, cross_ratio: float, beta: float
) -> None:
    """The gradient is 2 beta (z - e) / n per own and rho / others of it per cross code, n the valid
    elements; the quantizer's loss has exactly this, whatever the partner; the codes get none.
    """
    commitment = CrossModalCommitmentLoss(beta=beta, cross_ratio=cross_ratio)
    module = draw.quantizer(names, partner=partner, commitment=commitment)
    z, masks = leaves(draw.features(names)), draw.masks(names)
    out = module(z, masks)
    codes = {n: draw.codes()[out.indices[n].clamp(min=0)].requires_grad_() for n in names}
    direct = commitment(z, codes, masks)
    assert torch.equal(direct, out.loss)
    assert not any(g.any() for g in gradient(direct, *codes.values()))
    for a in names:
        expected = torch.zeros_like(z[a])
        present = [b for b in names if b != a and (masks[a] & masks[b]).any()]
        for b in (a, *present):
            weight = beta if a == b else beta * cross_ratio / len(present)
            both = (masks[a] & masks[b])[..., None]
            n = max(int(both.sum()) * draw.D, 1)
            expected += torch.where(both, 2 * weight * (z[a] - codes[b]) / n, 0).detach()
        (found,) = gradient(out.loss, z[a])
        # Five roundings for each of at most three terms, and two to add them.
        close(found, expected, 20 * EPS * float(expected.abs().max()) + 20 * EPS)


@pytest.mark.parametrize("names", [NAMES[:2], NAMES])
def test_each_loss_reaches_its_own_inputs(names: Sequence[str]) -> None:
    """True where a gradient must arrive, False where it must be exactly zero."""
    draw = Draw(B=5, T=7, D=8, L=12, strided=True, seed=1)
    z = leaves(draw.features(names))
    module = draw.quantizer(names)
    out = module(z)
    codebook = module.codebook.requires_grad_()
    x, y = z[names[0]], randn(5, 7, 3, seed=2).requires_grad_()
    club = CLUBEstimator(8, 3, hidden_dim=16).double()
    cpc = CrossCPC(8, names, num_steps=2).double()
    nets = [*club.parameters()]
    steps = [*cpc.parameters()]
    z_rest = list(z.values())[1:]
    detached = module({name: value.detach() for name, value in z.items()})
    cases = {
        "commitment": (out.loss, [*z.values()], [codebook, y, *nets, *steps]),
        "codes alone": (sum(q.sum() for q in out.quantized.values()), [*z.values()], [y]),
        "matching": (CrossModalCodeMatchingLoss()(z, codebook), [*z.values(), codebook], [y]),
        "matching, frozen codes": (
            CrossModalCodeMatchingLoss()(z, module.codebook),
            [*z.values()],
            [codebook],
        ),
        "club": (club(x, y), [x, y, *nets], [*z_rest, codebook]),
        "club's penalty": (
            club.penalty(x, y),
            [x, y, *club.p_mu.parameters()],
            [*z_rest, codebook, *club.p_logvar.parameters()],
        ),
        "club, fit": (club.learning_loss(x, y), nets, [*z.values(), y]),
        "cpc": (cpc(z, start="all").loss, [*z.values(), *steps], [codebook, y, *nets]),
    }
    assert not detached.loss.requires_grad
    for term, (value, reached, untouched) in cases.items():
        assert isinstance(value, Tensor)
        assert all(g.any() for g in gradient(value, *reached)), term
        assert not any(g.any() for g in gradient(value, *untouched)), term


@pytest.mark.parametrize("names", [NAMES[:2], NAMES])
def test_cpc_predicts_the_future_of_others_from_the_past_of_each(names: Sequence[str]) -> None:
    """What lies after the last predicted segment, or in an unrelated modality, has no influence."""
    draw = Draw(B=5, T=7, D=8, L=5, strided=False, seed=3)
    cpc = CrossCPC(8, names, num_steps=2).double()
    z = leaves(draw.features(names))
    for g in gradient(cpc(z, start=3).loss, *z.values()):
        assert all(g[:, t].any() for t in range(5))
        assert not g[:, 5:].any()
    pair = gradient(cpc({n: z[n] for n in names[:2]}, start=3).loss, *z.values())
    assert all(g.any() for g in pair[:2])
    assert not any(g.any() for g in pair[2:])
