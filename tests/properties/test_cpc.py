"""InfoNCE and Cross-CPC: what chance costs, what knowing saves, and what does not matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties.strategies import EPS, NAMES, Draw, assert_near, draws, randn
from torch import Tensor, nn

from mmvq import CrossCPC
from mmvq.functional import info_nce, info_nce_ref, top1_hits

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
    assert_near(cpc(z, start=start).loss, math.log(draw.B), 10 * EPS)

    terms = []
    for a in names:
        for b in (other for other in names if other != a):
            both = masks[a][:, start - 1, None] & masks[b][:, start - 1 :]  # [B, steps]
            if both.any():
                candidates = both.sum(0).double().log().expand(draw.B, steps)
                terms.append(candidates[both].mean())
    expected = torch.stack(terms).mean() if terms else 0.0
    assert_near(cpc(z, masks, start=start).loss, expected, 10 * EPS)


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
    assert_near(loss, expected, 10 * EPS * (1 + scale))
    assert set(accuracy) == {(a, b) for a in names for b in names if a != b}
    if scale:
        assert all(value == 1 for value in accuracy.values())
    wrong = {name: x.roll(i, 0) for i, (name, x) in enumerate(z.items())}
    loss, accuracy = cpc(wrong, start="all")
    assert_near(loss, expected + scale, 10 * EPS * (1 + scale))
    if scale:
        assert all(value == 0 for value in accuracy.values())


@every_axis
@every_number
@given(draw=draws(), steps=st.integers(1, 2), first_step=st.integers(0, 1))
def test_the_loss_is_the_mean_of_its_problems(
    names: Sequence[str], draw: Draw, axis: Any, steps: int, first_step: int
) -> None:
    """Eq. 6, one pair, step and start at a time: clip i's prediction (rows) against each future."""
    torch.manual_seed(draw.seed)
    draw = replace(draw, T=draw.T + steps + first_step)
    settings: dict[str, Any] = {"num_steps": steps, "first_step": first_step}
    cpc = CrossCPC(draw.D, names, context_dim=3, normalize_over=axis, **settings).double()
    z = draw.features(names)
    loss, accuracy = cpc(z, start="all")
    axes = {"targets": (1,), "contexts": (0,), "both": (0, 1)}[axis]
    losses, every = [], torch.arange(draw.B)
    for a in names:
        for b in (other for other in names if other != a):
            hits = []
            for start in range(1, draw.T - steps - first_step + 2):
                context = cpc.contexts[a](z[a][:, :start])[0][:, -1]
                for k, weight in enumerate(cpc.predictors[a]):
                    scores = context @ weight.T @ z[b][:, start - 1 + first_step + k].T
                    nce = [-scores.log_softmax(dim).diagonal().mean() for dim in axes]
                    losses.append(torch.stack(nce).mean())
                    hits.append((scores.argmax(axes[-1]) == every).double().mean())
            share = torch.stack(hits).mean().float()
            assert_near(accuracy[a, b], share, torch.finfo(torch.float32).eps)
    expected = torch.stack(losses).mean()
    assert_near(loss, expected, 1000 * EPS * (1 + float(expected.detach())))


@every_number
def test_own_futures_are_weighed_apart(names: Sequence[str]) -> None:
    """self_weight 0.1 adds a tenth of the mean over a = b: ln B each under equal scores."""
    B = 5
    z = Draw(B=B, T=4, D=3, L=1, strided=True, seed=0).features(names)
    cpc = CrossCPC(3, names, self_weight=0.1).double()
    for weight in cpc.predictors.values():
        weight.data.zero_()
    loss, accuracy = cpc(z, start="all")
    assert_near(loss, 1.1 * math.log(B), 10 * EPS)
    assert len(accuracy) == len(names) ** 2
    single = cpc({names[0]: z[names[0]]}, start=1)
    assert_near(single.loss, 0.1 * math.log(B), 10 * EPS)


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
    assert_near(actual.loss, expected.loss, 1000 * EPS * (1 + float(expected.loss.detach())))
    for pair, accuracy in expected.accuracy.items():
        assert_near(actual.accuracy[pair], accuracy, 10 * EPS)


@every_number
@given(draw=draws())
def test_all_starts_are_the_mean_of_each(names: Sequence[str], draw: Draw) -> None:
    torch.manual_seed(draw.seed)
    cpc = CrossCPC(draw.D, names, first_step=0).double()
    z = draw.features(names)
    each = [cpc(z, start=t).loss for t in range(1, draw.T + 1)]
    expected = torch.stack(each).mean().detach()
    assert_near(cpc(z, start="all").loss, expected, 1000 * EPS * (1 + float(expected)))
    drawn = [cpc(z, generator=torch.Generator().manual_seed(draw.seed)).loss for _ in range(2)]
    assert torch.equal(*drawn)
    assert any(torch.equal(drawn[0], loss) for loss in each)


@pytest.mark.parametrize("normalize", [False, True])
@given(draw=draws(), temperature=st.sampled_from((0.5, 1.0, 3.0)))
def test_info_nce_is_its_reference(draw: Draw, temperature: float, normalize: bool) -> None:
    """Leading dimensions are independent problems; invalid pairs are not there; both directions."""
    query, key = draw.features(["query", "key"]).values()
    settings: dict[str, Any] = {"temperature": temperature, "normalize": normalize}
    if normalize:
        reference = [nn.functional.normalize(x, dim=-1) for x in (query, key)]
    else:
        reference = [query, key]
    # Logits of |q| |k| / temperature, D roundings each, and a mean over T of them.
    size = max(1.0, float(query.norm(dim=-1).max() * key.norm(dim=-1).max())) / temperature
    atol = 10 * (draw.D + draw.T) * EPS * (1 + size)
    each = torch.stack([info_nce_ref(q, k, temperature) for q, k in zip(*reference, strict=True)])
    back = torch.stack([info_nce_ref(k, q, temperature) for q, k in zip(*reference, strict=True)])
    assert_near(info_nce(query, key, **settings), each.mean(), atol)
    both = info_nce(query, key, symmetric=True, **settings)
    assert_near(both, (each.mean() + back.mean()) / 2, atol)
    mask = draw.masks(["query"])["query"]
    found = info_nce(query, key, mask=mask, reduction="none", **settings)
    hits = top1_hits(query, key, mask=mask, **settings)
    for problem in range(draw.B):
        kept = mask[problem]
        q, k = (x[problem, kept] for x in (query, key))
        alone = info_nce(q, k, reduction="none", **settings)
        assert_near(found[problem, kept], alone, atol)
        assert not found[problem, ~kept].any()
        assert torch.equal(hits[problem, kept], top1_hits(q, k, **settings))
        assert not hits[problem, ~kept].any()


@every_axis
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(axis: Any, normalize: bool) -> None:
    """Of features and predictors, masked and not, over all starts and two steps."""
    torch.manual_seed(0)
    draw = Draw(B=3, T=4, D=2, L=1, strided=True, seed=0)
    settings: dict[str, Any] = {"num_steps": 2, "self_weight": 0.3, "normalize_over": axis}
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
