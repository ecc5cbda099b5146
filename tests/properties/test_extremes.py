"""Batches that no one wants: nothing crashes, and nothing that is not a number enters the state.

In float32, the dtype whose range is narrow. What a loss says of an impossible batch is its own
matter (it overflows beyond 1e19, whose square is no float32); what it leaves behind is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parts import LOSSES, losses
from properties.strategies import Draw, assert_same_bits, draws, every_wiring
from support import state
from torch import Tensor

from mmvq import MultiModalEMAQuantizer

LARGEST = torch.finfo(torch.float32).max
SCALES = (1e-45, 1e-38, 1e-20, 1.0, 1e9, 1e14, 1e17, 1e19, 1e30, LARGEST)
INITS = st.sampled_from(("uniform", "samples", "kmeans"))
SPOILS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "constant": lambda x: x[:1, :1].expand_as(x),
    "zero": torch.zeros_like,
    "one NaN": lambda x: x.index_fill(0, torch.tensor([0]), torch.nan),
    "all NaN": lambda x: torch.full_like(x, torch.nan),
    "one Inf": lambda x: x.index_fill(0, torch.tensor([0]), -torch.inf),
    "one huge": lambda x: x.index_fill(0, torch.tensor([0]), LARGEST),
}


def batch(draw: Draw, names: Sequence[str], step: int, scale: float = 1.0) -> dict[str, Tensor]:
    z = draw.features(names, step)
    return {name: (scale * x / x.abs().max()).float() for name, x in z.items()}


def finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())


@every_wiring
@given(
    draw=draws(),
    init=INITS,
    scale=st.sampled_from(SCALES),
    spoil=st.sampled_from(sorted(SPOILS)),
    masked=st.booleans(),
)
def test_the_quantizer_survives_any_batch(
    names: Sequence[str],
    partner: Any,
    draw: Draw,
    init: Any,
    scale: float,
    spoil: str,
    masked: bool,
) -> None:
    """Also as the first one, which gives the codes; the batches after it are as ever."""
    module = MultiModalEMAQuantizer(
        draw.D, draw.L, names, partner=partner, init=init, reset_after=2
    )
    for step in range(3):
        z = {name: SPOILS[spoil](x) for name, x in batch(draw, names, step, scale).items()}
        masks = draw.masks(names, step)
        if masked:
            masks = {name: torch.zeros_like(mask) for name, mask in masks.items()}
        _, indices, loss = module(z, masks)
        assert all(((i >= -1) & (i < draw.L)).all() for i in indices.values())
        assert all(finite(x) for x in module.state_dict().values())
        assert not masked or loss == 0
    for step in range(3, 6):
        quantized, _, loss = module(batch(draw, names, step))
        assert finite(loss)
        assert all(map(finite, quantized.values()))
        assert all(finite(x) for x in module.state_dict().values())


@every_wiring
@given(draw=draws(), init=INITS, scale=st.sampled_from((1e16, 1e30, LARGEST)))
def test_a_vector_too_large_to_square_is_as_one_that_is_not_finite(
    names: Sequence[str], partner: Any, draw: Draw, init: Any, scale: float
) -> None:
    """The limit is 1e15: neither enters the state, as vector or as partner."""
    settings = {"partner": partner, "init": init, "reset_after": 2}
    large, infinite = (MultiModalEMAQuantizer(draw.D, draw.L, names, **settings) for _ in "12")
    infinite.load_state_dict(large.state_dict())
    for step in range(3):
        z = batch(draw, names, step)
        for module, value in ((large, scale), (infinite, torch.inf)):
            module({name: x.index_fill(0, torch.tensor([0]), value) for name, x in z.items()})
        assert_same_bits(state(large), state(infinite))


@pytest.mark.parametrize("start", ["constant", "duplicated"])
def test_codes_that_are_all_the_same_part_again(start: str) -> None:
    """Ties go to the lowest index, so that all but one fall idle; the reset spreads them."""
    L, names = 16, ("audio", "video")
    module = MultiModalEMAQuantizer(4, L, names, reset_after=5)
    if start == "constant":
        module({name: torch.ones(8, 5, 4) for name in names})
    else:
        module.set_codes(torch.full((L, 4), 0.5))
    assert (module.codebook - module.codebook[0]).abs().max() < 1e-4
    events = torch.randn(L, 4)
    for step in range(120):
        z = events[torch.randint(L, (16, 5))]
        result = module({name: z + 0.05 * torch.randn_like(z) for name in names})
        if step == 0 and start == "duplicated":
            assert all((i == 0).all() for i in result.indices.values())
        if step == 80:
            module.usage(reset=True)
    usage = module.usage()
    assert int((~usage.dead).sum()) > L * 3 // 4
    assert all(x > L / 2 for x in usage.perplexity.values())


@pytest.mark.parametrize("kind", LOSSES)
@given(draw=draws(), scale=st.sampled_from(SCALES), spoil=st.sampled_from(sorted(SPOILS)))
def test_losses_and_gradients_are_finite_wherever_they_can_be(
    kind: str, draw: Draw, scale: float, spoil: str
) -> None:
    """Up to 1e9, constant or not, D = 1, T = 1; with nothing valid, whatever the padding holds.

    Beyond, and on NaN, they raise nothing, and a NaN shows.
    """
    names = ("audio", "video")
    z = {name: SPOILS[spoil](x) for name, x in batch(draw, names, 0, scale).items()}
    z = {name: x.clone().requires_grad_() for name, x in z.items()}
    loss = losses(names, draw.codes().float())[kind]
    masks = {name: torch.ones(draw.B, draw.T, dtype=torch.bool) for name in names}
    value = loss(z, masks)
    value.backward()
    if scale <= 1e9 and spoil in ("as it is", "constant", "zero"):
        assert finite(value)
        assert all(x.grad is not None and finite(x.grad) for x in z.values())
    if spoil == "all NaN" and draw.B > 1:
        assert value.isnan()
    for x in z.values():
        x.grad = None
    nothing = loss(z, {name: torch.zeros_like(mask) for name, mask in masks.items()})
    nothing.backward()
    assert nothing == 0
    assert all(x.grad is None or finite(x.grad) for x in z.values())
