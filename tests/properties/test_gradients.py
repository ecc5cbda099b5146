"""Where gradients go: through the choice of a code, and from each term to its own inputs only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties.strategies import EPS, NAMES, Draw, assert_near, draws, every_wiring, randn
from torch import Tensor

from mmvq import CLUBEstimator, CrossCPC, CrossModalCodeMatchingLoss, CrossModalCommitmentLoss
from mmvq.functional import rotate, straight_through


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("through", [straight_through, rotate])
@given(draw=draws(), size=st.sampled_from((0.0, 1e-30, 1e-4, 1.0, 1e3)))
def test_the_value_is_the_code_to_the_bit(
    through: Any, dtype: torch.dtype, draw: Draw, size: float
) -> None:
    """Whatever the length of z, down to zero, and whatever the dtype.

    The gradient of the sum is finite wherever its intermediate sums, of at most 8 D |e| / |z|, can
    be; at z = 0, where there is nothing to rotate, it is 1.
    """
    z = (size * randn(9, draw.D, seed=draw.seed)).to(dtype).requires_grad_()
    codes = (100 * randn(9, draw.D, seed=draw.seed + 1)).to(dtype).requires_grad_()
    out = through(z, codes)
    assert torch.equal(out, codes)
    (found,) = gradient(out.sum(), z)
    scale = codes.norm(dim=-1) / z.norm(dim=-1)
    zero = (z == 0).all(-1)
    assert found[zero | (8 * draw.D * scale < torch.finfo(dtype).max)].isfinite().all()
    assert (found[zero] == 1).all()
    assert not gradient(out.sum(), codes)[0].any()


@given(draw=draws())
def test_rotation_turns_z_onto_its_code(draw: Draw) -> None:
    """J = (|e| / |z|) Q with Q orthogonal and J z = e, so that the angle of J^T g to z is that of g
    to e. Where z and e are nearly opposite (|z/|z| + e/|e|| <= 1e-3) J is the identity, and just
    above that the reflection loses a factor of 1e3: rounding is below 1e3 * 10 (D + 4) eps.
    """
    z = randn(11, draw.D, seed=draw.seed).requires_grad_()
    e = randn(11, draw.D, seed=draw.seed + 1)
    e[0], e[1] = 2 * z[0].detach(), -3 * z[1].detach()
    J = torch.autograd.functional.jacobian(lambda x: rotate(x, e), z.detach())
    J = J[torch.arange(11), :, torch.arange(11)]  # [11, D, D]; other rows do not matter
    opposite = (z / z.norm(dim=-1, keepdim=True) + e / e.norm(dim=-1, keepdim=True)).norm(dim=-1)
    turned = opposite > 1e-3
    scale = e.norm(dim=-1) / z.norm(dim=-1)
    atol = 1e4 * (draw.D + 4) * EPS
    Q = J / scale[:, None, None]
    eye = torch.eye(draw.D, dtype=z.dtype).expand_as(Q)
    assert not turned[1]
    assert torch.equal(J[~turned], eye[~turned])
    assert_near((Q @ Q.mT)[turned], eye[turned], atol)
    reached = (Q @ z.detach()[..., None]).squeeze(-1) * scale[:, None]
    assert_near(reached[turned], e[turned], atol * float(e.norm(dim=-1).max()))

    g = randn(11, draw.D, seed=draw.seed + 2)
    (arrived,) = gradient(rotate(z, e), z, weight=g)
    kept = (arrived * z).sum(-1) / (arrived.norm(dim=-1) * z.norm(dim=-1))
    had = (g * e).sum(-1) / (g.norm(dim=-1) * e.norm(dim=-1))
    assert_near(kept.detach()[turned], had[turned], atol)


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
        present = [b for b in names if b != a and masks[b].any()]
        for b in (a, *present):
            weight = beta if a == b else beta * cross_ratio / len(present)
            both = (masks[a] & masks[b])[..., None]
            n = max(int(both.sum()) * draw.D, 1)
            expected += torch.where(both, 2 * weight * (z[a] - codes[b]) / n, 0).detach()
        (found,) = gradient(out.loss, z[a])
        # Five roundings for each of at most three terms, and two to add them.
        assert_near(found, expected, 20 * EPS * float(expected.abs().max()) + 20 * EPS)


@pytest.mark.parametrize("names", [NAMES[:2], NAMES])
@given(draw=draws())
def test_pairwise_ratios_pull_in_their_direction_only(names: Sequence[str], draw: Draw) -> None:
    """(a, b) pulls z_a towards e_b; a pair that is absent is 0."""
    a, b = names[:2]
    z, codes = leaves(draw.features(names)), draw.features(names, 1)
    own = CrossModalCommitmentLoss(cross_ratio={})(z, codes)
    loss = CrossModalCommitmentLoss(cross_ratio={(a, b): 0.7})(z, codes) - own
    found = dict(zip(names, gradient(loss, *z.values()), strict=True))
    difference = (z[a] - codes[b]).detach()
    pull = 0.25 * 0.7 / (len(names) - 1) * 2 * difference / difference.numel()
    # The difference of two losses cancels the own term, which is of the size of `bound`.
    bound = 20 * EPS * (1 + float((z[a] - codes[a]).detach().abs().max()))
    assert_near(found.pop(a), pull, bound)
    assert not any(g.any() for g in found.values())
    every = {(x, y): 0.5 for x in names for y in names if x != y}
    each = CrossModalCommitmentLoss(cross_ratio=every)(z, codes)
    assert torch.equal(each, CrossModalCommitmentLoss(cross_ratio=0.5)(z, codes))


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
