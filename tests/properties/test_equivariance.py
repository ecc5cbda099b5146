"""What may be permuted, doubled or moved: the result follows, and nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties.strategies import (
    EPS,
    NAMES,
    Draw,
    Tensors,
    assert_near_state,
    assert_same_bits,
    draws,
    every_wiring,
    randn,
    start,
)
from support import close, state
from torch import Tensor

from mmvq import EMACodebook, MultiModalEMAQuantizer

STEPS = 3


def permute(batch: Tensors, order: Tensor, dim: int) -> dict[str, Tensor]:
    return {name: x.index_select(dim, order) for name, x in batch.items()}


@every_wiring
@given(draw=draws(), dim=st.sampled_from((0, 1)))
def test_permuting_batch_or_time(names: Sequence[str], partner: Any, draw: Draw, dim: int) -> None:
    plain, moved = (draw.quantizer(names, partner=partner) for _ in range(2))
    for step in range(STEPS):
        z, masks = draw.features(names, step), draw.masks(names, step)
        order = randn(z[names[0]].shape[dim], seed=draw.seed + step).argsort()
        expected = plain(z, masks)
        actual = moved(permute(z, order, dim), permute(masks, order, dim))
        assert_same_bits(actual.indices, permute(expected.indices, order, dim))
        atol = STEPS * draw.slack(z)
        for name in names:
            wanted = expected.quantized[name].index_select(dim, order)
            close(actual.quantized[name], wanted, atol)
        close(actual.loss, expected.loss, atol)
        assert_near_state(state(moved), state(plain), atol)


@every_wiring
@given(draw=draws())
def test_permuting_codes(names: Sequence[str], partner: Any, draw: Draw) -> None:
    plain, moved = (draw.quantizer(names, partner=partner) for _ in range(2))
    order = randn(draw.L, seed=draw.seed).argsort()
    start(moved.ema_codebook, draw.codes()[order])
    for step in range(STEPS):
        z, masks = draw.features(names, step), draw.masks(names, step)
        expected, actual = plain(z, masks), moved(z, masks)
        atol = STEPS * draw.slack(z)
        for name in names:
            chosen = actual.indices[name]
            back = torch.where(chosen < 0, -1, order[chosen])
            assert torch.equal(back, expected.indices[name])
            close(actual.quantized[name], expected.quantized[name], atol)
        close(actual.loss, expected.loss, atol)
        rows = {"ages": 1, "usage": 1, "codes": 0, "sums": 0, "counts": 0}
        wanted = {
            key: value.index_select(rows[key.rsplit(".")[-1]], order) if value.ndim else value
            for key, value in state(plain).items()
        }
        assert_near_state(state(moved), wanted, atol)


@every_wiring
@given(draw=draws(), init=st.sampled_from(("uniform", "samples", "kmeans")))
def test_the_order_of_modalities_changes_no_bit(
    names: Sequence[str], partner: Any, draw: Draw, init: Any
) -> None:
    """Neither their order at construction nor that of the mappings; resets and first codes too."""
    settings = {"partner": partner, "init": init, "reset_after": 1, "update_from": names[:2]}
    first = draw.quantizer(names, **settings)
    others = [draw.quantizer(order, **settings) for order in permutations(names)]
    for step in range(STEPS):
        z, masks = draw.features(names, step), draw.masks(names, step)
        expected = first(z, masks)
        for module in others:
            order = module.modalities
            actual = module({n: z[n] for n in order}, {n: masks[n] for n in reversed(order)})
            assert_same_bits(actual.quantized, expected.quantized)
            assert_same_bits(actual.indices, expected.indices)
            assert torch.equal(actual.loss, expected.loss)
            assert_same_bits(state(module), state(first))


@every_wiring
@given(draw=draws())
def test_swapping_what_two_modalities_hold(names: Sequence[str], partner: Any, draw: Draw) -> None:
    """No modality is privileged: names are labels. Sums are taken in another order, hence slack."""
    plain, moved = (draw.quantizer(names, partner=partner) for _ in range(2))
    given_to = dict(zip(names, (*names[1:], names[0]), strict=True))
    for step in range(STEPS):
        z, masks = draw.features(names, step), draw.masks(names, step)
        expected = plain(z, masks)
        actual = moved({given_to[n]: z[n] for n in names}, {given_to[n]: masks[n] for n in names})
        atol = STEPS * draw.slack(z)
        for name in names:
            assert torch.equal(actual.indices[given_to[name]], expected.indices[name])
            close(actual.quantized[given_to[name]], expected.quantized[name], atol)
        close(actual.loss, expected.loss, atol)
        rows = torch.tensor([sorted(names).index(given_to[n]) for n in sorted(names)])
        wanted = state(moved)
        for key in ("ages", "usage"):
            wanted[f"ema_codebook.{key}"] = wanted[f"ema_codebook.{key}"][rows]
        assert_near_state(wanted, state(plain), atol)


@pytest.mark.parametrize("names", [NAMES[:2], NAMES])
@given(draw=draws())
def test_equal_modalities_are_one_modality_seen_often(names: Sequence[str], draw: Draw) -> None:
    """Aligned: the ordinary EMA of one codebook over M times the batch, to the bit."""
    module = draw.quantizer(names, partner="aligned")
    book = EMACodebook(draw.D, draw.L, decay=0.9)
    start(book, draw.codes())
    for step in range(STEPS):
        (x,) = draw.features(names[:1], step).values()
        index = module(dict.fromkeys(names, x)).indices
        rows = x.reshape(-1, draw.D).repeat(len(names), 1)
        chosen = book.search(rows)
        book.accumulate(rows, chosen)
        book.apply()
        for name in names:
            assert torch.equal(index[name].flatten(), chosen[: draw.B * draw.T])
        assert torch.equal(module.codebook, book.weight)
        assert torch.equal(module.ema_codebook.counts, book.counts)


@pytest.mark.parametrize("names", [NAMES[:1], NAMES[:2], NAMES])
@pytest.mark.parametrize("partner", ["aligned", "none"])
@given(draw=draws(), reset_after=st.sampled_from((None, 1)))
def test_translation(
    names: Sequence[str], partner: Any, draw: Draw, reset_after: int | None
) -> None:
    """Moving features and codes by v moves the codebook and the outputs by v, resets included.

    With eps = 0: smoothing draws codes towards the origin, which is not translated.
    """
    settings = {"partner": partner, "eps": 0.0, "reset_after": reset_after}
    plain, moved = (draw.quantizer(names, **settings) for _ in range(2))
    v = 10 * randn(draw.D, seed=draw.seed + 3)
    start(moved.ema_codebook, draw.codes() + v)
    for step in range(STEPS):
        z, masks = draw.features(names, step), draw.masks(names, step)
        shifted = {name: x + v for name, x in z.items()}
        expected, actual = plain(z, masks), moved(shifted, masks)
        assert_same_bits(actual.indices, expected.indices)
        atol = STEPS * draw.slack(shifted)
        for name in names:
            wanted = torch.where(masks[name][..., None], expected.quantized[name] + v, 0)
            close(actual.quantized[name], wanted, atol)
        close(actual.loss, expected.loss, atol)
        close(moved.codebook, plain.codebook + v, atol)
        mass = plain.ema_codebook.counts
        close(moved.ema_codebook.counts, mass, draw.L * EPS * float(mass.sum()))


@every_wiring
@given(draw=draws())
def test_features_without_time_are_one_segment(
    names: Sequence[str], partner: Any, draw: Draw
) -> None:
    flat, timed = (draw.quantizer(names, partner=partner) for _ in range(2))
    for step in range(STEPS):
        z, masks = draw.features(names, step), draw.masks(names, step)
        z, masks = ({name: x[:, :1] for name, x in batch.items()} for batch in (z, masks))
        expected = timed(z, masks)
        actual = flat(*({n: x.squeeze(1) for n, x in batch.items()} for batch in (z, masks)))
        assert_same_bits(actual.quantized, {n: q[:, 0] for n, q in expected.quantized.items()})
        assert_same_bits(actual.indices, {n: i[:, 0] for n, i in expected.indices.items()})
        close(actual.loss, expected.loss, draw.slack(z))  # other strides, another order
        assert_same_bits(state(flat), state(timed))


@every_wiring
@given(draw=draws(), init=st.sampled_from(("uniform", "samples", "kmeans")))
def test_bits_repeat(names: Sequence[str], partner: Any, draw: Draw, init: Any) -> None:
    """The same inputs from the same state, the same bits: resets, first codes and partner too."""
    runs: list[tuple[MultiModalEMAQuantizer, list[Tensors]]] = []
    for seed in range(2):
        torch.manual_seed(seed)  # no generator is read
        module = draw.quantizer(names, partner=partner, init=init, reset_after=1)
        runs.append((module, [module(draw.features(names, s)).quantized for s in range(STEPS)]))
    for actual, expected in zip(*(outputs for _, outputs in runs), strict=True):
        assert_same_bits(actual, expected)
    assert_same_bits(state(runs[0][0]), state(runs[1][0]))
