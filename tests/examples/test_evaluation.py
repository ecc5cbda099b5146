"""Heads, scores and the directions of transfer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from cmg.data import BACKGROUND, Clips
from cmg.evaluation import (
    clip_scores,
    evaluate,
    segment_scores,
)

WAYS = {f"{a}->{b}" for a in ("audio", "video", "text") for b in ("audio", "video", "text")}
WAYS -= {"audio->audio", "video->video", "text->text"}


def ideal_codes(clips: Clips, width: int = 8) -> dict[str, Tensor]:
    """One shared code per event, as a perfect encoder would give; split 0 shows background."""
    generator = torch.Generator().manual_seed(0)
    book = torch.randn(clips.num_classes + 1, width, generator=generator)
    return {name: book[x - BACKGROUND] for name, x in clips.segment_labels.items()}


def test_shared_codes_transfer_perfectly(clips: Clips) -> None:
    blocks = evaluate(ideal_codes(clips), clips, seed=0)
    assert set(blocks["classification"]) == set(blocks["localization"]) == WAYS
    for scores in blocks["classification"].values():
        assert scores == {"accuracy": 1.0, "chance": 7 / 20, "upper_bound": 1.0}
    for scores in blocks["localization"].values():
        ones = {name for name, value in scores.items() if value == 1.0}
        assert ones == set(scores) - {"chance", "chance_f1"}


def test_codes_in_separate_places_do_not_transfer(clips: Clips) -> None:
    codes = ideal_codes(clips)
    codes["audio"] = codes["audio"].roll(1, dims=-1)
    scores = evaluate(codes, clips, seed=0)["classification"]
    assert scores["video->text"]["accuracy"] == 1.0
    assert scores["audio->video"]["upper_bound"] == scores["video->audio"]["upper_bound"] == 1.0
    assert scores["audio->video"]["accuracy"] < 0.7
    assert scores["video->audio"]["accuracy"] < 0.7


def test_the_upper_bound_is_the_target_with_its_own_labels(clips: Clips) -> None:
    codes = ideal_codes(clips)
    noise = torch.Generator().manual_seed(0)
    codes["text"] = torch.randn(codes["text"].shape, generator=noise)
    scores = evaluate(codes, clips, seed=0)
    for a in ("audio", "video"):
        assert scores["classification"][f"{a}->text"]["upper_bound"] < 0.7
        assert scores["classification"][f"text->{a}"]["upper_bound"] == 1.0
        assert scores["localization"][f"text->{a}"]["upper_bound"] == 1.0


@pytest.mark.parametrize(("scale", "shift"), [(1e-4, 0.0), (1.0, 3.0), (1e4, -1e4)])
def test_the_scale_and_origin_of_the_codes_do_not_matter(
    clips: Clips, scale: float, shift: float
) -> None:
    codes = {name: x * scale + shift for name, x in ideal_codes(clips).items()}
    for scores in evaluate(codes, clips, seed=0)["classification"].values():
        assert scores["accuracy"] == 1.0


def test_codes_that_are_all_the_same_are_at_chance(clips: Clips) -> None:
    codes = {name: torch.ones(120, 4, 8) for name in clips.features}
    for scores in evaluate(codes, clips, seed=0)["classification"].values():
        assert scores["accuracy"] <= scores["chance"]


def test_same_seed_same_figures_and_the_global_state_is_left_alone(clips: Clips) -> None:
    noise = torch.Generator().manual_seed(0)
    codes = {
        name: x + 2 * torch.randn(x.shape, generator=noise)
        for name, x in ideal_codes(clips).items()
    }
    before = torch.get_rng_state()
    first = evaluate(codes, clips, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert evaluate(codes, clips, seed=3) == first


def test_only_split_1_teaches_and_only_split_2_tests(clips: Clips) -> None:
    codes = ideal_codes(clips)
    first = evaluate(codes, clips, seed=0)
    labels = clips.labels.clone()
    labels[clips.rows(0)] = 10**6
    spoilt = {name: x.clone() for name, x in codes.items()}
    for x in spoilt.values():
        x[clips.rows(0)] = torch.nan
    again = evaluate(spoilt, dataclasses.replace(clips, labels=labels), seed=0)
    assert again == first


def test_without_segment_labels_there_is_no_localization(clips: Clips) -> None:
    codes = ideal_codes(clips)
    assert evaluate(codes, dataclasses.replace(clips, segment_labels={}), 0)["localization"] == {}


def test_clip_scores_by_hand() -> None:
    scores = clip_scores(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]))
    assert scores == {"accuracy": 0.75, "chance": 0.5}


def test_segment_scores_by_hand() -> None:
    truth = torch.tensor([[1, 1, 2, 0, 0, 0]])
    predicted = torch.tensor([[1, 2, 0, 3, 0, 0]])  # one hit, three claims, three events
    assert segment_scores(predicted, truth) == {
        "segment_f1": pytest.approx(1 / 3),
        "precision": pytest.approx(1 / 3),
        "recall": pytest.approx(1 / 3),
        "segment_accuracy": 0.5,
        "chance": 0.5,
        "chance_f1": pytest.approx(4 / 9),  # event 1 in all six segments: two hits, three events
    }


def test_background_everywhere_has_no_f1() -> None:
    truth = torch.tensor([[1, 0]])
    assert segment_scores(torch.zeros_like(truth), truth)["segment_f1"] == 0.0
