"""Tasks on codes whose scores are known: perfect ones, and ones that say nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cmg import digits
from cmg.clips import BACKGROUND, PRETRAIN, TRAIN, Clips
from cmg.data import load_clips
from cmg.errors import DataError
from experiments.followups import all_followups
from experiments.followups.channels import best_channels, channel_scores
from experiments.followups.open_set import UNKNOWN, open_scores, renumber, score_open_set
from experiments.tasks import all_tasks, segmentation
from experiments.tasks.across_sets import localize_across
from experiments.tasks.masks import f_score, mask_scores, mean_iou
from experiments.tasks.picture import plot_rows
from experiments.tasks.retrieval import recall, retrieve
from experiments.tasks.segmentation import Frames
from experiments.tasks.unpaired import classify_unpaired

NAMES = ("audio", "video", "text")
WAYS = {f"{a}->{b}" for a in NAMES for b in NAMES if a != b}
CLASSES, T = 4, 4


@dataclass
class Stub:
    """A run whose features are its codes."""

    clips: Clips
    seed: int = 0

    @property
    def config(self) -> Any:
        return SimpleNamespace(shapes=dict.fromkeys(NAMES))

    @property
    def model(self) -> Any:
        return SimpleNamespace(quantizer=SimpleNamespace(codebook=book()))

    def quantize(self, features: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {name: x.flatten(3).mean(3) if x.ndim > 3 else x for name, x in features.items()}, {}

    @property
    def codes(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.quantize(self.clips.features)


def book(width: int = 8) -> Tensor:
    return torch.randn(CLASSES + 1, width, generator=torch.Generator().manual_seed(0))


def make_clips(seed: int, *, informed: bool = True) -> Clips:
    """Clips of which every modality shows the same code per event, or noise."""
    generator = torch.Generator().manual_seed(seed)
    N = 240
    labels = torch.arange(N) % CLASSES
    event = torch.rand(N, T, generator=generator) < 0.6
    event[:, 0] = True
    shown = torch.where(event, labels[:, None], BACKGROUND)
    features = {
        name: book()[shown - BACKGROUND] if informed else torch.randn(N, T, 8, generator=generator)
        for name in NAMES
    }
    return Clips(
        features, labels, dict.fromkeys(NAMES, shown), torch.arange(N) // 80, None, CLASSES
    )


@pytest.fixture(scope="module")
def perfect() -> Stub:
    return Stub(make_clips(1))


@pytest.fixture(scope="module")
def lost(noise: Stub) -> dict[str, dict[str, float]]:
    return retrieve(noise)


@pytest.fixture(scope="module")
def noise() -> Stub:
    return Stub(make_clips(1, informed=False))


def test_every_task_gives_plain_numbers_again_and_leaves_the_global_state_alone(
    perfect: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = make_frames(60)
    query_scores = segmentation.query_scores
    monkeypatch.setattr(segmentation, "query_scores", partial(query_scores, steps=2))
    monkeypatch.setattr(segmentation, "scenes", lambda run: (frames, frames))
    for module in ("across_sets", "unpaired"):
        monkeypatch.setattr(f"experiments.tasks.{module}.away", lambda run: run.clips)
    for name, task in (all_tasks | all_followups).items():
        before = torch.get_rng_state()
        first = task(perfect)
        assert torch.equal(torch.get_rng_state(), before), name
        torch.rand(3)
        again = task(perfect)
        assert json.dumps(again, allow_nan=False) == json.dumps(first), name


def test_perfect_codes_find_every_event_of_another_set(perfect: Stub) -> None:
    scores = localize_across(perfect, target=make_clips(2))
    assert set(scores) == WAYS
    for way in scores.values():
        perfectly = {key: way[key] for key in ("segment_f1", "same_modality", "upper_bound")}
        assert set(perfectly.values()) == {1.0}
        assert way["chance_f1"] < 0.5


def test_noise_finds_no_more_events_of_another_set_than_chance(noise: Stub) -> None:
    for way in localize_across(noise, target=make_clips(2, informed=False)).values():
        assert way["segment_f1"] < way["chance_f1"] + 0.1


def test_another_set_is_measured_by_its_own_encodings(perfect: Stub) -> None:
    turned = make_clips(2)
    turned = dataclasses.replace(
        turned, features={name: x.roll(3, -1) for name, x in turned.features.items()}
    )
    for way in localize_across(perfect, target=turned).values():
        assert way["segment_f1"] < 0.6
        assert way["upper_bound"] == 1.0


def test_perfect_codes_name_clips_of_shared_classes_both_ways(perfect: Stub) -> None:
    scores = classify_unpaired(perfect, second=make_clips(2), classes=(1, 3))
    assert set(scores) == {"first->second", "second->first"}
    for block in scores.values():
        assert set(block) == WAYS
        for way in block.values():
            assert way == {
                "accuracy": 1.0,
                "chance": 0.5,
                "same_modality": 1.0,
                "upper_bound": 1.0,
            }


def test_noise_names_clips_by_chance(noise: Stub) -> None:
    for block in classify_unpaired(
        noise, second=make_clips(2, informed=False), classes=range(4)
    ).values():
        mean = sum(way["accuracy"] for way in block.values()) / len(block)
        assert mean == pytest.approx(0.25, abs=0.11)  # 80 clips: 0.048 each, 2.3 of them


def test_sets_that_do_not_fit_are_refused(perfect: Stub) -> None:
    other = make_clips(2)
    wide = dataclasses.replace(other, features=other.features | {"text": torch.zeros(240, T, 9)})
    with pytest.raises(DataError, match=r"takes text \[N, 4, \.\.\., 8\]; got"):
        localize_across(perfect, target=wide)
    strange = dataclasses.replace(other, features={"smell": other.features["text"]})
    with pytest.raises(DataError, match=r"modalities of the run \(audio video text\); got smell"):
        classify_unpaired(perfect, second=strange)


def test_sets_of_one_modality_each_are_enough(perfect: Stub) -> None:
    """As UCF has video and VGGSound has sound; neither is what the run was trained on."""
    seen, heard = (
        dataclasses.replace(clips, features={name: clips.features[name]})
        for clips, name in ((make_clips(2), "video"), (make_clips(3), "audio"))
    )
    perfectly = {"accuracy": 1.0, "chance": 0.5, "upper_bound": 1.0}
    assert classify_unpaired(perfect, seen, heard, (0, 2)) == {
        "first->second": {"video->audio": perfectly},
        "second->first": {"audio->video": perfectly},
    }


def test_recall_by_hand() -> None:
    similarity = torch.zeros(12, 12)
    similarity[0, 0] = 1.0  # first
    similarity[1, :6] = torch.tensor([9.0, 4, 8, 7, 6, 5])  # sixth
    similarity[2:] = torch.arange(12.0)
    similarity[2:, 0] = 99
    # Rows 2 to 11: item i has 11 - i others above, and item 0: ranks 11, 10, ..., 2.
    ranks = [1, 6, *range(11, 1, -1)]
    assert recall(similarity) == {
        "r5": sum(rank <= 5 for rank in ranks) / 12,
        "r10": sum(rank <= 10 for rank in ranks) / 12,
        "chance_r5": 5 / 12,
        "chance_r10": 10 / 12,
    }


def test_ties_are_no_hits() -> None:
    assert recall(torch.ones(20, 20))["r10"] == 0.0


def test_retrieval_follows_what_queries_tell(
    noise: Stub, lost: dict[str, dict[str, float]]
) -> None:
    """Codes that tell clips apart find their audio; codes of noise do not."""
    clips = noise.clips
    clear = dataclasses.replace(clips, features=dict.fromkeys(NAMES, clips.features["audio"]))
    found = retrieve(Stub(clear))
    assert set(found) == set(lost) == {"video->text", "text->video"}
    for way in found.values():
        assert way["r5"] == way["upper_bound_r5"] > 0.8
        assert way["chance_r5"] == 5 / 80
    for way in lost.values():
        assert way["r10"] < 0.3  # chance is 0.125, a standard error 0.037


def test_the_gallery_may_be_of_a_modality_that_the_run_does_not_know(
    noise: Stub, lost: dict[str, dict[str, float]]
) -> None:
    class Two(Stub):
        @property
        def config(self) -> Any:
            return SimpleNamespace(shapes=dict.fromkeys(("video", "text")))

        @property
        def codes(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
            return self.quantize({name: self.clips.features[name] for name in self.config.shapes})

    assert retrieve(Two(noise.clips)) == lost


def test_retrieval_needs_two_queries_and_a_gallery(perfect: Stub) -> None:
    with pytest.raises(DataError, match="needs clips with smell"):
        retrieve(perfect, gallery="smell")


def test_iou_by_hand() -> None:
    truth = torch.zeros(3, 2, 2, dtype=torch.bool)
    truth[0, 0] = True
    truth[1, 0, 0] = True
    mask = torch.zeros_like(truth)
    mask[0, :, 0] = True  # 1 of 3
    mask[1] = truth[1]  # 1
    mask[2, 0, 0] = True  # no object: 3 of 4 pixels are left out
    assert mean_iou(mask, truth) == pytest.approx((1 / 3 + 1 + 3 / 4) / 3)


def test_f_score_by_hand() -> None:
    truth = torch.tensor([[[True, True, False, False]], [[False, False, False, False]]])
    p = torch.tensor([[[0.9, 0.2, 0.6, 0.1]], [[1.0, 1.0, 1.0, 1.0]]])
    best = max(
        1.3 * P * R / (0.3 * P + R) for P, R in ((1.0, 0.5), (0.5, 0.5), (2 / 3, 1.0), (0.5, 1.0))
    )
    assert f_score(p, truth) == pytest.approx(best)
    assert f_score(truth.float(), truth) == pytest.approx(1.0)


def test_f_score_is_the_definition_at_every_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(5, 6, 7, generator=generator, dtype=torch.float64)
    truth = torch.rand(5, 6, 7, generator=generator) < 0.3
    best = 0.0
    for threshold in torch.linspace(0, 1, 255, dtype=torch.float64):
        total = 0.0
        for q, there in zip(p >= threshold, truth, strict=True):
            hits = (q & there).sum().item()
            P, R = hits / max(q.sum().item(), 1), hits / there.sum().item()
            total += 1.3 * P * R / (0.3 * P + R) if hits else 0.0
        best = max(best, total / 5)
    assert f_score(p, truth) == pytest.approx(best, rel=1e-12)


def test_a_mask_of_nothing_scores_zero_where_there_is_something() -> None:
    truth = torch.ones(1, 2, 2, dtype=torch.bool)
    assert mask_scores(torch.zeros(1, 2, 2), truth)["miou"] == 0.0
    assert f_score(torch.zeros(1, 2, 2), torch.zeros_like(truth)) == 0.0


def make_frames(n: int) -> Frames:
    """Two of 3 x 3 cells show two digits of three, a pixel a cell; queries name one of them."""
    generator = torch.Generator().manual_seed(0)
    cells, drawn = torch.zeros(n, 3, 3, 3), torch.zeros(n, 3, 3, dtype=torch.bool)
    named = torch.randint(3, (n,), generator=generator)
    for i, digit in enumerate(named.tolist()):
        first, second = torch.randperm(9, generator=generator)[:2].tolist()
        cells[i].view(9, 3)[first, digit] = drawn[i].view(9)[first] = True
        cells[i].view(9, 3)[second, (digit + 1 + i % 2) % 3] = 1
    codes = book()[named]
    noise = torch.randn(n, 8, generator=generator)
    queries = {"audio": codes, "text": codes, "noise": noise}
    return Frames(cells, queries, drawn, named, cells.amax(-1))


def test_masks_follow_the_query_from_modality_to_modality() -> None:
    frames = make_frames(300)
    train, test = (
        Frames(
            *(
                {name: q[part] for name, q in x.items()} if isinstance(x, dict) else x[part]
                for x in frames
            )
        )
        for part in (slice(0, 200), slice(200, 300))
    )
    scores = segmentation.query_scores(train, test, seed=0, steps=80)
    assert scores["audio->text"]["miou"] == scores["audio->text"]["upper_bound"] > 0.95
    assert scores["audio->text"]["class"] > 0.95
    assert scores["audio->text"]["chance"] < 0.7
    assert scores["noise->text"]["miou"] < 0.7
    assert scores["audio->noise"]["upper_bound"] < 0.7


def test_scenes_are_the_segments_that_name_a_digit(tmp_path: Path) -> None:
    path = tmp_path / "scenes.npz"
    arrays = digits.render_scenes(3, clips=(1, 8, 4))
    np.savez(path, **arrays)
    run = Stub(load_clips(path))
    train, test = segmentation.scenes(run, path)
    for frames, split in ((train, 1), (test, 2)):
        named = (arrays["split"][:, None] == split) & (arrays["seg_labels_text"] >= 0)
        assert frames.masks.flatten(1).any(1).all()
        assert len(frames.cells) == len(frames.pictures) == named.sum() > 0
        assert frames.classes.tolist() == arrays["seg_labels_audio"][named].tolist()
        assert set(frames.queries) == {"audio", "text"}
        assert torch.equal(frames.queries["text"], torch.from_numpy(arrays["text"][named]))
    assert train.cells.shape[1:3] == (7, 7)


def test_rows_of_pictures_are_drawn(tmp_path: Path) -> None:
    plot_rows(tmp_path / "rows.png", {"a": torch.rand(2, 4, 4)}, ["1?", "2?"])
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_channel_scores_are_the_mean_over_pairs() -> None:
    codes = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = [codes[i] * codes[j] for i in range(7) for j in range(7) if i != j]
    expected = -0.7 * torch.stack(pairs).mean(0) + 0.3 * codes.var(0)
    torch.testing.assert_close(channel_scores(codes), expected)


def test_channels_that_differ_between_codes_are_kept() -> None:
    codes = torch.ones(6, 4)
    codes[:, 2] = torch.tensor([-1.0, 1, -1, 1, -1, 1])
    codes[:, 0] = torch.tensor([0.0, 1, 0, 1, 0, 1])
    assert best_channels(codes, 2).tolist() == [0, 2]


def test_open_scores_by_hand() -> None:
    truth = torch.tensor([0, 0, 1, 2, UNKNOWN, UNKNOWN])
    answer = torch.tensor([0, UNKNOWN, 1, 1, UNKNOWN, 0])
    assert open_scores(answer, truth) == {
        "known": 0.5,
        "unknown": 0.5,
        "h_score": 0.5,
        "chance": pytest.approx(1 / (1 + 0.5**0.5) ** 2),
    }
    assert open_scores(torch.full((6,), UNKNOWN), truth)["h_score"] == 0.0


def test_chance_is_the_best_blind_guess() -> None:
    truth = torch.tensor([0, 0, 1, UNKNOWN])
    c = 2 / 3
    best = max(2 * p * c * (1 - p) / (p * c + 1 - p) for p in torch.linspace(0, 1, 1001).tolist())
    chance = open_scores(truth, truth)["chance"]
    assert chance >= best - 1e-7  # c is a float32 quotient
    assert chance == pytest.approx(best, abs=1e-5)


def test_classes_that_are_not_known_are_unknown() -> None:
    labels = torch.tensor([0, 1, 2, 3, 9, -1])
    assert renumber(labels, torch.tensor([1, 3])).tolist() == [
        UNKNOWN,
        0,
        UNKNOWN,
        1,
        UNKNOWN,
        UNKNOWN,
    ]


def test_open_set_learns_nothing_from_unknown_classes_or_the_test(perfect: Stub) -> None:
    """Codes of unknown classes in training, and half of the unknown clips in the test, go away."""
    clips = perfect.clips
    first = score_open_set(perfect)
    known = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(0))[:2]
    unknown = ~torch.isin(clips.labels, known)
    spoilt = {name: x.clone() for name, x in clips.features.items()}
    for x in spoilt.values():
        x[unknown & (clips.split == TRAIN)] = torch.nan
    split = torch.where(unknown & (torch.arange(240) > 200), PRETRAIN, clips.split)
    again = score_open_set(Stub(dataclasses.replace(clips, features=spoilt, split=split)))
    assert set(first) == WAYS
    for way, scores in first.items():
        assert scores["known"] == again[way]["known"] > 0.7  # about 0.9 are to be accepted
