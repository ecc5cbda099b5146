"""What enters the codebook: counts, sums, the moving average, and how it may be split up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    clip_mean,
    draws,
    every_wiring,
    pending,
)
from support import close, state
from torch import Tensor

from mmvq import EMACodebook, update_codebooks
from mmvq.functional import cross_attend_ref, laplace_smoothing, nearest_code_ref

WEIGHTS = st.sampled_from((0.0, 0.3, 0.5, 1.0))


def partner_of(partner: Any, z: Tensors, masks: Tensors, name: str) -> Tensor:
    """r of one modality, written out one vector at a time."""
    others = {n: x for n, x in z.items() if n != name}
    if partner == "attention":
        return cross_attend_ref(z[name], others, masks)
    if partner is clip_mean:
        return clip_mean(z[name], others, masks)
    r = z[name].clone()
    for b, t in torch.cartesian_prod(*map(torch.arange, r.shape[:2])).view(-1, 2).tolist():
        there = [x[b, t] for n, x in others.items() if masks[n][b, t]]
        if there and partner == "aligned":
            r[b, t] = torch.stack(there).mean(0)
    return r


def contributions(partner: Any, weight: float, z: Tensors, masks: Tensors) -> dict[str, Tensor]:
    """What each valid vector adds to o: (1 - w) z + w r, `[n, D]` for each modality."""
    mixed = {n: (1 - weight) * z[n] + weight * partner_of(partner, z, masks, n) for n in z}
    return {name: x[masks[name]] for name, x in mixed.items()}


@every_wiring
@given(draw=draws(), weight=WEIGHTS)
def test_each_code_gets_its_vectors(
    names: Sequence[str], partner: Any, draw: Draw, weight: float
) -> None:
    """Counts sum to the valid vectors, sums to their contributions: in all and for each code."""
    module = draw.quantizer(names, partner=partner, partner_weight=weight, update="manual")
    z, masks = draw.features(names), draw.masks(names)
    indices = module(z, masks).indices
    _, counts, sums = pending(module)
    for row, name in zip(counts, sorted(names), strict=True):
        chosen = indices[name][masks[name]]
        assert torch.equal(row, torch.bincount(chosen, minlength=draw.L).double())
    expected = torch.zeros_like(sums)
    for name, values in contributions(partner, weight, z, masks).items():
        for value, index in zip(values, indices[name][masks[name]].tolist(), strict=True):
            expected[index] += value
    close(sums, expected, draw.slack(z))


@every_wiring
@given(draw=draws(), weight=WEIGHTS)
def test_mixed_assignment_gives_each_code_the_mixtures_nearest_to_it(
    names: Sequence[str], partner: Any, draw: Draw, weight: float
) -> None:
    """Mixtures are counted and summed at their own nearest codes, and vectors counted at theirs."""
    settings = {"partner": partner, "partner_weight": weight, "assignment": "mixed"}
    module = draw.quantizer(names, update="manual", **settings)
    z, masks = draw.features(names), draw.masks(names)
    indices = module(z, masks).indices
    _, counts, sums = pending(module)
    own, mixed = counts.chunk(2)
    expected = torch.zeros_like(sums)
    mixtures = contributions(partner, weight, z, masks)
    for row, row_of_mixtures, name in zip(own, mixed, sorted(names), strict=True):
        chosen = indices[name][masks[name]]
        assert torch.equal(row, torch.bincount(chosen, minlength=draw.L).double())
        nearest = nearest_code_ref(mixtures[name], module.codebook)
        assert torch.equal(row_of_mixtures, torch.bincount(nearest, minlength=draw.L).double())
        expected.index_add_(0, nearest, mixtures[name])
    close(sums, expected, draw.slack(z))


@every_wiring
@given(draw=draws(), decay=st.sampled_from((0.5, 0.9, 0.99)), eps=st.sampled_from((0.0, 1e-5, 0.1)))
def test_the_average_follows_its_recurrence(
    names: Sequence[str], partner: Any, draw: Draw, decay: float, eps: float
) -> None:
    """Eq. 7 for N and o, sum N for the mass, e = o / smoothed(N) if chosen, and the snapshot."""
    module = draw.quantizer(names, partner=partner, decay=decay, eps=eps)
    book = module.ema_codebook
    for step in range(3):
        z, masks = draw.features(names, step), draw.masks(names, step)
        before = state(book)
        out = module(z, masks)
        chosen = torch.cat([out.indices[n][masks[n]] for n in names])
        values = torch.cat(list(contributions(partner, 0.5, z, masks).values()))
        if not len(chosen):
            assert_same_bits(state(book), before | {"steps": before["steps"] + 1})
            continue
        n = torch.bincount(chosen, minlength=draw.L).double()
        s = torch.zeros_like(book.sums).index_add(0, chosen, values)
        counts = decay * before["counts"] + (1 - decay) * n
        atol = draw.slack(z) * (step + 1)
        scale = EPS * float(counts.sum()) * draw.L
        close(book.counts, counts, scale)
        mass = decay * before["counts"].sum() + (1 - decay) * len(chosen)
        close(book.counts.sum(), mass, scale)
        close(book.sums, decay * before["sums"] + (1 - decay) * s, atol)
        smoothed = laplace_smoothing(counts, eps)
        # Counts down to decay^3 >= 1/8: the division multiplies errors by 8, rather than by 2.
        averaged = torch.where(n[:, None] > 0, book.sums / smoothed[:, None], before["codes"])
        close(book.codes, averaged, 8 * atol)
        assert torch.equal(book.codes[n == 0], before["codes"][n == 0])  # nothing chose them
        for name in names:
            nearest = nearest_code_ref(z[name].flatten(0, 1), before["codes"]).view(draw.B, draw.T)
            assert torch.equal(out.indices[name], torch.where(masks[name], nearest, -1))
            wanted = torch.where(masks[name][..., None], before["codes"][nearest], 0)
            assert torch.equal(out.quantized[name], wanted)


@every_wiring
@given(draw=draws(), decay=st.sampled_from((0.1, 0.5, 0.99)))
def test_codes_stay_in_the_box_of_what_made_them(
    names: Sequence[str], partner: Any, draw: Draw, decay: float
) -> None:
    """o / N is a weighted mean of the old code and the contributions of this step.

    Smoothing multiplies it by N / smoothed(N), which is 1 for eps = 0. For eps > 0 and the mean
    count m = sum N / L, that is between N / (N + eps) and 1 + eps / m.
    """
    module = draw.quantizer(names, partner=partner, decay=decay, eps=0.0)
    smooth = draw.quantizer(names, partner=partner, decay=decay, eps=0.1)
    z, masks = draw.features(names), draw.masks(names)
    indices = module(z, masks).indices
    smooth(z, masks)
    values = contributions(partner, 0.5, z, masks)
    atol = draw.slack(z) / decay  # N >= decay here, where slack expects 1/2 or more
    counts = smooth.ema_codebook.counts
    for code in range(draw.L):
        old = draw.codes()[code][None]
        made = torch.cat([old, *(values[n][indices[n][masks[n]] == code] for n in names)])
        low, high = made.amin(0), made.amax(0)
        assert (module.codebook[code] >= low - atol).all()
        assert (module.codebook[code] <= high + atol).all()
        if len(made) == 1:  # nothing chose it
            assert torch.equal(smooth.codebook[code], old[0])
            continue
        factor = smooth.codebook[code].norm() / module.codebook[code].norm()
        assert factor >= counts[code] / (counts[code] + 0.1) - 1e-9
        assert factor <= 1 + 0.1 / counts.mean() + 1e-9


def halves(batch: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    chunks = {name: x.split(size) for name, x in batch.items()}
    return [dict(zip(chunks, parts, strict=True)) for parts in zip(*chunks.values(), strict=True)]


@every_wiring
@given(draw=draws(), size=st.sampled_from((1, 2)), reset_after=st.sampled_from((None, 2)))
def test_micro_batches_equal_one_batch(
    names: Sequence[str], partner: Any, draw: Draw, size: int, reset_after: int | None
) -> None:
    """All micro-batches see one snapshot; nothing moves before `update_codebook`."""
    settings = {"partner": partner, "reset_after": reset_after}
    whole = draw.quantizer(names, **settings)
    split = draw.quantizer(names, **settings, update="manual")
    for step in range(3):
        z, masks = draw.features(names, step), draw.masks(names, step)
        expected = whole(z, masks)
        before = state(split)
        parts = [split(*part) for part in zip(halves(z, size), halves(masks, size), strict=True)]
        assert_same_bits(state(split), before)
        split.update_codebook()
        atol = 3 * draw.slack(z)
        for name in names:
            assert torch.equal(torch.cat([p.indices[name] for p in parts]), expected.indices[name])
            quantized = torch.cat([p.quantized[name] for p in parts])
            close(quantized, expected.quantized[name], atol)
        assert_near_state(state(split), state(whole), atol)
        before = state(split)
        split.update_codebook()  # nothing is left to apply
        assert_same_bits(state(split), before)


@every_wiring
@given(draw=draws(), ranks=st.integers(1, 3))
def test_ranks_that_add_their_statistics_are_one_process(
    names: Sequence[str], partner: Any, draw: Draw, ranks: int
) -> None:
    """Each rank on its clips, maybe none, and one sum of flat buffers: the same bits on all."""
    settings = {"partner": partner, "reset_after": 1}
    whole = draw.quantizer(names, **settings)
    parts = [draw.quantizer(names, **settings, update="manual") for _ in range(ranks)]
    for step in range(3):
        z, masks = draw.features(names, step), draw.masks(names, step)
        whole(z, masks)
        for rank, part in enumerate(parts):
            part(
                {n: x[rank::ranks] for n, x in z.items()},
                {n: m[rank::ranks] for n, m in masks.items()},
            )
        total = torch.stack([pending(part)[0] for part in parts]).sum(0)
        for part in parts:
            part.ema_codebook.update_(total)
            assert_same_bits(state(part), state(parts[0]))
        assert_near_state(state(parts[0]), state(whole), 3 * draw.slack(z))


@given(draw=draws())
def test_update_codebooks_is_update_codebook_of_each(draw: Draw) -> None:
    """Wherever they are, each once, whatever their sizes and dtypes."""

    def build() -> torch.nn.ModuleList:
        quantizers = [
            draw.quantizer(NAMES[: m + 1], update="manual", decay=0.5 + m / 10) for m in range(3)
        ]
        single = EMACodebook(draw.D, draw.L + 1)
        return torch.nn.ModuleList([torch.nn.Sequential(*quantizers), single, quantizers[0]])

    together, apart = build(), build()
    together.load_state_dict(apart.state_dict())
    for step in range(2):
        for root in (together, apart):
            for m, module in enumerate(root[0]):
                module(draw.features(NAMES[: m + 1], step), draw.masks(NAMES[: m + 1], step))
            rows = draw.features(NAMES[:1], step)[NAMES[0]].reshape(-1, draw.D).float()
            root[1].accumulate(rows, root[1].search(rows))
        update_codebooks([together, together[1]])
        for module in apart[0]:
            module.update_codebook()
        apart[1].apply()
        assert_same_bits(state(together), state(apart))
    assert together[1].steps == 2


@pytest.mark.parametrize("names", [NAMES[:2], NAMES])
@given(draw=draws(), init=st.sampled_from(("uniform", "samples", "kmeans")))
def test_update_from(names: Sequence[str], draw: Draw, init: Any) -> None:
    """Every modality searches and is counted; only the named ones make and move the codebook."""
    module = draw.quantizer(
        names, partner="none", update_from=names[:1], update="manual", init=init
    )
    z, masks = draw.features(names), draw.masks(names)
    indices = module(z, masks).indices
    assert torch.equal(
        indices[names[1]][masks[names[1]]], module.encode(z[names[1]][masks[names[1]]])
    )
    module.update_codebook()
    alone = draw.quantizer(names, partner="none", init=init)
    alone({names[0]: z[names[0]]}, {names[0]: masks[names[0]]})
    for key in ("codes", "sums", "counts"):
        assert torch.equal(getattr(module.ema_codebook, key), getattr(alone.ema_codebook, key))
    usage = module.usage().counts
    assert all(usage[name].sum() == masks[name].sum() for name in names)
