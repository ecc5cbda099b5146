"""Masked, missing, truncated and not finite: four ways not to be there, one result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parts import LOSSES, losses
from properties.strategies import (
    EPS,
    NAMES,
    WIRINGS,
    Draw,
    assert_near_state,
    assert_same_bits,
    draws,
    every_wiring,
    randn,
)
from support import close, state
from torch import Tensor

SEVERAL = st.sampled_from((NAMES[:2], NAMES))
BAD = st.sampled_from((torch.nan, torch.inf, -torch.inf))
INITS = st.sampled_from(("uniform", "samples", "kmeans"))


def pad(batch: Mapping[str, Tensor], extra: int, value: float) -> dict[str, Tensor]:
    """`extra` more segments at the end, full of `value`."""
    return {
        name: torch.cat([x, torch.full_like(x[:, :1], value).repeat_interleave(extra, 1)], 1)
        for name, x in batch.items()
    }


def fill(batch: Mapping[str, Tensor], keep: Mapping[str, Tensor], bad: float) -> dict[str, Tensor]:
    """`bad` in one component of every row that is not kept."""
    spoilt = {name: x.clone() for name, x in batch.items()}
    for name, x in spoilt.items():
        x[..., -1] = torch.where(keep[name], x[..., -1], bad)
    return spoilt


@every_wiring
@given(draw=draws(), extra=st.integers(1, 4), bad=BAD, init=INITS)
def test_a_masked_tail_is_a_truncated_input(
    names: Sequence[str], partner: Any, draw: Draw, extra: int, bad: float, init: Any
) -> None:
    """Whatever lies in the tail; padding changes the shapes of products, hence slack."""
    short, long = (draw.quantizer(names, partner=partner, init=init) for _ in range(2))
    for step in range(2):
        z, masks = draw.features(names, step), draw.masks(names, step)
        expected = short(z, masks)
        actual = long(pad(z, extra, bad), pad(masks, extra, False))
        # k-means repeats ten times what a step does once.
        atol = 20 * draw.slack(pad(z, extra, 0.0))
        for name in names:
            shown, tail = actual.quantized[name].split([draw.T, extra], 1)
            close(shown, expected.quantized[name], atol)
            assert not tail.any()
            index, tail = actual.indices[name].split([draw.T, extra], 1)
            assert torch.equal(index, expected.indices[name])
            assert (tail == -1).all()
        close(actual.loss, expected.loss, atol)
        assert_near_state(state(long), state(short), atol)


@pytest.mark.parametrize("kind", LOSSES)
@given(names=SEVERAL, draw=draws(), extra=st.integers(1, 4), bad=BAD)
def test_a_masked_tail_is_a_truncated_input_of_every_loss(
    kind: str, names: Sequence[str], draw: Draw, extra: int, bad: float
) -> None:
    """Values and gradients, all smooth and of the order of a few nats: 1e4 eps leaves room for a
    thousand roundings.
    """
    torch.manual_seed(draw.seed)
    loss, masks = losses(names, draw.codes(), torch.float64)[kind], draw.masks(names)
    z = {name: x.requires_grad_() for name, x in draw.features(names).items()}
    found = []
    for batch, valid in ((z, masks), (pad(z, extra, bad), pad(masks, extra, False))):
        value = loss(batch, valid)
        grads = torch.autograd.grad(value, [*z.values()], allow_unused=True)
        found.append([value.detach(), *(torch.zeros(()) if g is None else g for g in grads)])
    for expected, actual in zip(*found, strict=True):
        close(actual, expected, 1e4 * EPS * (1 + float(expected.abs().max())))


@pytest.mark.parametrize(("names", "partner"), WIRINGS[1:])
@given(draw=draws(), bad=BAD, init=INITS)
def test_a_missing_modality_is_a_fully_masked_one(
    names: Sequence[str], partner: Any, draw: Draw, bad: float, init: Any
) -> None:
    """To the bit: which modality is absent changes at each step; outputs, loss and state agree."""
    settings = {"partner": partner, "init": init, "reset_after": 2}
    missing, masked = (draw.quantizer(names, **settings) for _ in range(2))
    for step in range(4):
        absent = names[step % len(names)]
        z, masks = draw.features(names, step), draw.masks(names, step)
        masks[absent] = torch.zeros_like(masks[absent])
        actual = masked(fill(z, masks, bad), masks)
        del z[absent], masks[absent]
        expected = missing(z, masks)
        assert not actual.quantized.pop(absent).any()
        assert (actual.indices.pop(absent) == -1).all()
        assert_same_bits(actual.quantized, expected.quantized)
        assert_same_bits(actual.indices, expected.indices)
        assert torch.equal(actual.loss, expected.loss)
        assert_same_bits(state(masked), state(missing))


@pytest.mark.parametrize("kind", ["matching", "commitment", "cpc", "cpc of cosines"])
@given(draw=draws(), bad=BAD)
def test_a_missing_modality_is_a_fully_masked_one_of_every_loss(
    kind: str, draw: Draw, bad: float
) -> None:
    """A mean over the same terms, in another order: a few roundings of a few nats."""
    torch.manual_seed(draw.seed)
    loss = losses(NAMES, draw.codes(), torch.float64)[kind]
    z, masks = draw.features(NAMES), draw.masks(NAMES)
    masks[NAMES[0]] = torch.zeros_like(masks[NAMES[0]])
    rest = {n: z[n] for n in NAMES[1:]}, {n: masks[n] for n in NAMES[1:]}
    expected = loss(*rest).detach()
    close(loss(fill(z, masks, bad), masks), expected, 100 * EPS * (1 + float(expected)))


@every_wiring
@given(draw=draws(), bad=BAD, init=INITS)
def test_rows_that_are_not_finite_leave_the_codebook_as_if_absent(
    names: Sequence[str], partner: Any, draw: Draw, bad: float, init: Any
) -> None:
    """State and the outputs of the others as if masked, to the bit; the loss shows it as NaN."""
    settings = {"partner": partner, "init": init, "reset_after": 2}
    spoilt, clean = (draw.quantizer(names, **settings) for _ in range(2))
    for step in range(3):
        z, keep = draw.features(names, step), draw.masks(names, step)
        expected, actual = clean(z, keep), spoilt(fill(z, keep, bad))
        assert_same_bits(state(spoilt), state(clean))
        for name in names:
            kept = keep[name]
            assert torch.equal(actual.quantized[name][kept], expected.quantized[name][kept])
            assert torch.equal(actual.indices[name][kept], expected.indices[name][kept])
            assert not actual.quantized[name][~kept].isfinite().all(-1).any()
            assert (actual.indices[name][~kept] == 0).all()
        assert actual.loss.isfinite() == all(kept.all() for kept in keep.values())
    assert spoilt.codebook.isfinite().all()


@pytest.mark.parametrize("names", [NAMES[:2], NAMES])
@given(draw=draws(), bad=BAD, init=INITS)
def test_partners_that_are_not_finite_leave_their_vectors_out(
    names: Sequence[str], draw: Draw, bad: float, init: Any
) -> None:
    keep = draw.masks(names)
    by_order = iter(sorted(names) * 3)

    def spoil(z: Tensor, others: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Tensor:
        name = next(by_order)
        return fill({name: z}, keep, bad)[name]

    spoilt = draw.quantizer(names, partner=spoil, init=init)
    clean = draw.quantizer(names, partner="none", init=init)
    for step in range(3):
        spoilt(draw.features(names, step))
        clean(draw.features(names, step), keep)
        assert_same_bits(state(spoilt), state(clean))


@given(draw=draws(), bad=BAD)
def test_absent_rows_need_not_even_be_in_the_batch(draw: Draw, bad: float) -> None:
    """One modality: a batch with spoilt rows moves the codebook as the batch of the others does."""
    spoilt, clean = (draw.quantizer(NAMES[:1], partner="none", init="samples") for _ in range(2))
    for step in range(3):
        z, keep = draw.features(NAMES[:1], step), draw.masks(NAMES[:1], step)
        spoilt(fill(z, keep, bad))
        clean({name: x[keep[name]] for name, x in z.items()})
        assert_same_bits(state(spoilt), state(clean))


@every_wiring
@given(draw=draws(), bad=BAD, through=st.sampled_from(("straight_through", "rotation")))
def test_what_lies_under_a_mask_reaches_no_gradient(
    names: Sequence[str], partner: Any, draw: Draw, bad: float, through: Any
) -> None:
    module = draw.quantizer(names, partner=partner, gradient=through)
    masks = draw.masks(names)
    z = {n: x.requires_grad_() for n, x in fill(draw.features(names), masks, bad).items()}
    out = module(z, masks)
    weight = randn(draw.D, seed=draw.seed)
    (out.loss + sum((q * weight).sum() for q in out.quantized.values())).backward()
    for name in names:
        gradient = z[name].grad
        assert gradient is not None
        assert gradient.isfinite().all()
        assert not gradient[~masks[name]].any()
        assert gradient[masks[name]].any(-1).all()
