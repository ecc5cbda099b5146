"""The state: who writes it, in what precision, and what a copy of it holds."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from properties.strategies import Draw, assert_same_bits, draws, every_wiring
from support import state

from mmvq import CrossModalCodeMatchingLoss, MultiModalEMAQuantizer

LOW = st.sampled_from((torch.bfloat16, torch.float16))
INITS = st.sampled_from(("uniform", "samples", "kmeans"))


def evaluate(module: MultiModalEMAQuantizer, *batch: Any) -> Any:
    return module.eval()(*batch)


def freeze(module: MultiModalEMAQuantizer, *batch: Any) -> Any:
    return module.train()(*batch, freeze=True)


@every_wiring
@given(draw=draws(), init=INITS, quiet=st.sampled_from((evaluate, freeze)))
@example(Draw(B=1, T=1, D=1, L=1, strided=False, seed=578527), "samples", evaluate)
def test_eval_and_freeze_write_nothing(
    names: Sequence[str], partner: Any, draw: Draw, init: Any, quiet: Callable[..., Any]
) -> None:
    """Before the first codes are drawn and after; float64 features do not widen the state either,
    and nothing is left pending. What they return is what training returns.
    """
    settings = {"partner": partner, "init": init, "reset_after": 1}
    module = MultiModalEMAQuantizer(draw.D, draw.L, names, **settings)
    for step in range(2):
        before = state(module)
        batch = draw.features(names, step), draw.masks(names, step)
        drawn = bool(module.ema_codebook.initialized)
        shown = quiet(module, *batch)
        assert_same_bits(state(module), before)
        module.train().update_codebook()
        assert_same_bits(state(module), before)
        trained = module(*batch)
        if drawn:  # a first batch without any valid vector leaves it to the second
            assert_same_bits(shown.quantized, trained.quantized)
            assert_same_bits(shown.indices, trained.indices)
            assert torch.equal(shown.loss, trained.loss)


@every_wiring
@given(
    draw=draws(),
    init=INITS,
    stop=st.integers(0, 3),
    dtype=st.sampled_from((torch.float64, torch.float32)),
)
def test_save_load_continue_is_never_stopping(
    names: Sequence[str], partner: Any, draw: Draw, init: Any, stop: int, dtype: torch.dtype
) -> None:
    """To the bit, from any step (0: before the first batch), into a module built differently."""
    settings = {"partner": partner, "reset_after": 2}
    going = MultiModalEMAQuantizer(draw.D, draw.L, names, init=init, **settings)

    def train(module: MultiModalEMAQuantizer, step: int) -> Any:
        z = {name: x.to(dtype) for name, x in draw.features(names, step).items()}
        return module(z, draw.masks(names, step))

    for step in range(stop):
        train(going, step)
    file = io.BytesIO()
    torch.save(going.state_dict(), file)
    file.seek(0)
    resumed = MultiModalEMAQuantizer(draw.D, draw.L, names[::-1], init=init, **settings)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_same_bits(state(resumed), state(going))
    for step in range(stop, stop + 3):
        expected, actual = train(going, step), train(resumed, step)
        assert_same_bits(actual.quantized, expected.quantized)
        assert torch.equal(actual.loss, expected.loss)
        assert_same_bits(state(resumed), state(going))


@every_wiring
@given(draw=draws(), dtype=LOW)
def test_low_precision_features_are_kept_as_if_in_float32(
    names: Sequence[str], partner: Any, draw: Draw, dtype: torch.dtype
) -> None:
    """State and loss are those of the same numbers in float32; the output has the input's dtype."""
    low = MultiModalEMAQuantizer(draw.D, draw.L, names, partner=partner, reset_after=1).to(dtype)
    wide = MultiModalEMAQuantizer(draw.D, draw.L, names, partner=partner, reset_after=1)
    wide.load_state_dict(low.state_dict())
    for step in range(2):
        z = {name: x.to(dtype) for name, x in draw.features(names, step).items()}
        masks = draw.masks(names, step)
        actual = low(z, masks)
        expected = wide({name: x.float() for name, x in z.items()}, masks)
        assert_same_bits(actual.indices, expected.indices)
        assert torch.equal(actual.loss, expected.loss)
        assert_same_bits(state(low), state(wide))
        rounded = {name: q.to(dtype) for name, q in expected.quantized.items()}
        assert_same_bits(actual.quantized, rounded)


@every_wiring
@given(draw=draws(), dtype=LOW)
def test_autocast_changes_nothing(
    names: Sequence[str], partner: Any, draw: Draw, dtype: torch.dtype
) -> None:
    if callable(partner):
        partner = "attention"  # a callable is the user's own, and runs without autocast as well
    plain, cast = (
        MultiModalEMAQuantizer(draw.D, draw.L, names, partner=partner, reset_after=1)
        for _ in range(2)
    )
    cast.load_state_dict(plain.state_dict())
    matching = CrossModalCodeMatchingLoss()
    for step in range(2):
        z = {name: x.float() for name, x in draw.features(names, step).items()}
        masks = draw.masks(names, step)
        expected, wanted = plain(z, masks), matching(z, plain.codebook, masks)
        with torch.autocast("cpu", dtype=dtype):
            actual, found = cast(z, masks), matching(z, cast.codebook, masks)
        assert_same_bits(actual.quantized, expected.quantized)
        assert torch.equal(actual.loss, expected.loss)
        assert torch.equal(found, wanted)
        assert_same_bits(state(cast), state(plain))
