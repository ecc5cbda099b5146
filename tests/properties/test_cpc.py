"""Cross-CPC: what chance costs, what a perfect prediction saves, and what does not matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties.strategies import EPS, NAMES, Draw, draws, randn
from support import close
from torch import Tensor, nn

from mmvq import CrossCPC

every_number = pytest.mark.parametrize("names", [NAMES[:2], NAMES])
every_axis = pytest.mark.parametrize("axis", ["targets", "contexts", "both"])


class LastSegment(nn.Module):
    """Stands in for an LSTM: the context is what was last observed."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


def predict(cpc: CrossCPC, scale: float) -> CrossCPC:
    """Make each prediction `scale` times the segment last observed."""
    for name in cpc.modalities:
        cpc.contexts[name] = LastSegment()
        weight = cpc.predictors[name]
        weight.data.copy_(scale * torch.eye(weight.shape[1]).expand_as(weight))
    return cpc


@every_axis
@every_number
@given(draw=draws(), steps=st.integers(1, 2))
def test_equal_logits_cost_the_logarithm_of_the_candidates(
    names: Sequence[str], draw: Draw, axis: Any, steps: int
) -> None:
    """ln B, or with masks the mean over predictions of the logarithm of the valid clips there."""
    steps = min(steps, draw.T)
    cpc = CrossCPC(draw.D, names, num_steps=steps, first_step=0, normalize_over=axis).double()
    for weight in cpc.predictors.values():
        weight.data.zero_()
    z, masks = draw.features(names), draw.masks(names)
    start = draw.T - steps + 1
    close(cpc(z, start=start).loss, math.log(draw.B), 10 * EPS)

    terms = []
    for a in names:
        for b in (other for other in names if other != a):
            both = masks[a][:, start - 1, None] & masks[b][:, start - 1 :]  # [B, steps]
            if both.any():
                candidates = both.sum(0).double().log().expand(draw.B, steps)
                terms.append(candidates[both].mean())
    expected = torch.stack(terms).mean() if terms else 0.0
    close(cpc(z, masks, start=start).loss, expected, 10 * EPS)


@every_axis
@every_number
@pytest.mark.parametrize("scale", [0.0, 3.0, 30.0])
def test_a_perfect_predictor_tends_to_zero(names: Sequence[str], axis: Any, scale: float) -> None:
    """Clips that stay on one axis each: ln(1 + (B - 1) e^-s) for scores of s and 0, accuracy 1."""
    B, T, D = 7, 5, 11
    cpc = predict(CrossCPC(D, names, num_steps=2, normalize_over=axis).double(), scale)
    z = dict.fromkeys(names, torch.eye(D, dtype=torch.float64)[:B, None].repeat(1, T, 1))
    loss, accuracy = cpc(z, start="all")
    expected = math.log1p((B - 1) * math.exp(-scale))
    # logsumexp over scores up to s: one rounding of s.
    close(loss, expected, 10 * EPS * (1 + scale))
    assert set(accuracy) == {(a, b) for a in names for b in names if a != b}
    if scale:
        assert all(value == 1 for value in accuracy.values())
    wrong = {name: x.roll(i, 0) for i, (name, x) in enumerate(z.items())}
    loss, accuracy = cpc(wrong, start="all")
    close(loss, expected + scale, 10 * EPS * (1 + scale))
    if scale:
        assert all(value == 0 for value in accuracy.values())


@every_axis
@every_number
@given(draw=draws())
def test_the_order_of_clips_and_modalities_does_not_matter(
    names: Sequence[str], draw: Draw, axis: Any
) -> None:
    """The same means in another order: a thousand roundings of a few nats."""
    torch.manual_seed(draw.seed)
    cpc = CrossCPC(draw.D, names, first_step=0, normalize_over=axis, self_weight=0.3).double()
    z, masks = draw.features(names), draw.masks(names)
    expected = cpc(z, masks, start="all")
    order = randn(draw.B, seed=draw.seed).argsort()
    actual = cpc(
        {name: z[name][order] for name in names[::-1]},
        {name: masks[name][order] for name in names},
        start="all",
    )
    close(actual.loss, expected.loss, 1000 * EPS * (1 + float(expected.loss.detach())))
    for pair, accuracy in expected.accuracy.items():
        close(actual.accuracy[pair], accuracy, 10 * EPS)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(normalize: bool) -> None:
    """Of features and predictors, masked and not, over all starts and two steps."""
    torch.manual_seed(0)
    draw = Draw(B=3, T=4, D=2, L=1, strided=True, seed=0)
    settings: dict[str, Any] = {"num_steps": 2, "self_weight": 0.3, "normalize_over": "both"}
    cpc = CrossCPC(2, NAMES[:2], normalize=normalize, **settings).double()
    masks = draw.masks(NAMES[:2])

    def loss(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
        z = dict(zip(NAMES, (first, second), strict=False))
        parameters = {f"predictors.{NAMES[0]}": weight}
        results = [
            torch.func.functional_call(cpc, parameters, (z, m), {"start": "all"}).loss
            for m in (None, masks)
        ]
        return torch.stack(results)

    inputs = [x.requires_grad_() for x in draw.features(NAMES[:2]).values()]
    assert torch.autograd.gradcheck(loss, (*inputs, cpc.predictors[NAMES[0]]))
