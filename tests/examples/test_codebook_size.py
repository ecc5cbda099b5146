"""The number of codes that the data ask for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cmg.codebook_size import SIZES, choose_codes, first_codes, held_out_information, largest
from mmvq.functional import nearest_code


def views(
    events: int, clips: int, noise: float = 0.3, seed: int = 0, variants: int = 1
) -> dict[str, Tensor]:
    """Two modalities that show the same events at random places, each with its own noise."""
    generator, fixed = (torch.Generator().manual_seed(n) for n in (seed, 9))
    places = (3 * torch.randn(events, 8, generator=fixed)).repeat_interleave(variants, 0)
    if variants > 1:
        places = places + 0.7 * torch.randn(len(places), 8, generator=fixed)
    shown = torch.randint(len(places), (clips, 5), generator=generator)
    return {
        name: places[shown] + noise * torch.randn(clips, 5, 8, generator=generator)
        for name in ("audio", "video")
    }


@pytest.mark.parametrize("events", [8, 16, 32])
def test_the_size_is_about_that_of_the_shared_events(events: int) -> None:
    """Of 12, 24, 48, ...: twice as many codes as events tell hardly less, four times as many do."""
    codes = choose_codes(views(events, 200), views(events, 200, seed=1))
    assert events <= len(codes) <= 2 * events
    assert codes.shape[1] == 8


def test_neither_the_order_of_the_clips_nor_rounding_decides_the_size() -> None:
    """Both change what k-means finds. Variants of an event make I flat from 24 to 48 codes."""
    sizes = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(200, generator=generator)
        z, held_out = (
            {
                name: x[order] * (1 + 1e-6 * torch.randn(x.shape, generator=generator))
                for name, x in views(12, 200, noise=0.7, seed=split, variants=8).items()
            }
            for split in (0, 1)
        )
        sizes.append(len(choose_codes(z, held_out)))
    assert set(sizes) == {48}


def test_what_is_masked_does_not_count() -> None:
    masks = {name: torch.ones(200, 5, dtype=torch.bool) for name in ("audio", "video")}
    masks["audio"][:60] = False  # without the modality
    for mask in masks.values():
        mask[:, 4] = False  # padding
    z, held_out = views(16, 200), views(16, 200, seed=1)
    codes = choose_codes(z, held_out, masks, masks)
    assert 16 <= len(codes) <= 32
    noise = [
        {name: torch.where(masks[name][..., None], x, 50 * torch.randn_like(x)) for name, x in y}
        for y in (z.items(), held_out.items())
    ]
    torch.testing.assert_close(choose_codes(*noise, masks, masks), codes, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("information", "position"),
    [
        ([0.5, 1.0, 1.02, 0.98, 0.97, 0.96], 4),  # .95 of the best or more, though not above
        ([0.5, 1.0, 0.6, 0.96, 0.7], 3),  # whatever lies between
        ([1.0, 1.04, 1.08], 2),
        ([2.0, 1.89, 1.85], 0),
        ([0.0, 0.009, 0.005, -0.2], 0),  # nothing to tell
        ([-0.1, -0.3], 0),
        ([0.0, 0.02, 0.0195], 2),
        ([0.0, 0.02, 0.0185], 1),
        ([2.0], 0),
        ([math.nan, math.nan], 0),
    ],
)
def test_the_largest_of_the_sizes_that_are_about_the_best(
    information: list[float], position: int
) -> None:
    assert largest(information) == position


def test_noise_asks_for_fewest_codes() -> None:
    apart = {name: torch.randn(100, 5, 8) for name in ("audio", "video")}
    assert len(choose_codes(apart, {name: torch.randn_like(x) for name, x in apart.items()})) <= 16


@pytest.mark.parametrize("L", [8, 512])
def test_codes_that_are_all_the_same_tell_nothing(L: int) -> None:
    same = {name: torch.zeros(20, 6, dtype=torch.long) for name in ("audio", "video")}
    assert abs(held_out_information(same, L)) < 0.05
    constant = {name: torch.zeros(9, 4, 8) for name in same}
    assert len(choose_codes(constant, constant)) == SIZES[0]


def test_fewer_segments_than_codes_still_give_codes() -> None:
    few = {name: x[:1] for name, x in views(8, 2).items()}
    assert len(choose_codes(few, few)) == SIZES[0]
    assert first_codes(few, 24).isfinite().all()


def test_clips_in_the_order_of_their_classes() -> None:
    """Sorted, or in turns: neither may put some classes in one half only."""
    event = torch.arange(16)
    for order in (event.repeat_interleave(20), event.repeat(20)):
        places = 3 * torch.randn(16, 8, generator=torch.Generator().manual_seed(9))
        clips = {name: places[order][:, None].expand(-1, 5, -1) for name in ("audio", "video")}
        assert len(choose_codes(clips, clips)) == 24


def test_information_by_hand() -> None:
    """Two codes, always the same in both modalities: ln 2, less what the priors take."""
    same = torch.arange(2).repeat(500, 1)
    both = {"audio": same, "video": same}
    assert held_out_information(both, 2) == pytest.approx(math.log(2), abs=5e-3)
    other = torch.randint(2, (500, 2), generator=torch.Generator().manual_seed(0))
    # the log-ratio of 500 segments, of which chance moves the table by about 1 / sqrt(500)
    assert held_out_information({"audio": same, "video": other}, 2) == pytest.approx(0, abs=0.02)


def test_the_order_of_the_modalities_does_not_matter() -> None:
    """Information is measured in both directions, which differ."""
    some = views(12, 60)
    some["video"] = some["video"].roll(1, 0) * (torch.rand(60, 1, 1) < 0.3) + some["video"]
    codes = first_codes(some, 16)
    indices = {name: nearest_code(x, codes) for name, x in some.items()}
    one, other = (
        held_out_information({"a": indices[a], "b": indices[b]}, 16)
        for a, b in (("audio", "video"), ("video", "audio"))
    )
    assert one == pytest.approx(other)
