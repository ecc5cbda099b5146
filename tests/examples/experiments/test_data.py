"""The fourth modality and fewer clips."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cmg import digits
from cmg.clips import PRETRAIN, TEST, TRAIN
from cmg.data import load_clips
from cmg.errors import DataError
from experiments import data
from experiments.matrix import EXPERIMENTS


@pytest.fixture(scope="module")
def rendering(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits") / "small.npz"
    np.savez(path, **digits.render(4, clips=(6, 40, 5)))
    return path


def test_the_display_shows_the_event_and_nothing_of_the_others(rendering: Path) -> None:
    clips = data.with_display(load_clips(rendering), "digits:4")
    assert clips.features["display"].shape == (51, 10, data.SENSORS)
    shown = clips.segment_labels["display"]
    assert (shown[clips.rows(PRETRAIN)] == -1).all()  # as in every modality
    labelled = clips.rows(TRAIN, TEST)
    together = torch.stack([x[labelled] for x in list(clips.segment_labels.values())[:3]])
    event = (together == clips.labels[labelled, None]).all(0)
    own = shown[labelled]
    assert (own[event] == clips.labels[labelled, None].expand_as(own)[event]).all()
    aside = ~event & (own >= 0)
    assert 0 < aside.any(1).sum() < len(labelled)
    assert not (own[aside] == together[:, aside]).any()


def test_digits_can_be_told_apart_on_the_display(rendering: Path) -> None:
    """By the nearest mean of the training clips: far from chance, and far from always."""
    clips = data.with_display(load_clips(rendering), "digits:4")
    x, y = clips.features["display"], clips.segment_labels["display"]
    rows = clips.rows(TRAIN)
    means = torch.stack([x[rows][y[rows] == digit].mean(0) for digit in range(-1, 10)])
    test = clips.rows(TEST)
    nearest = torch.cdist(x[test].flatten(0, 1), means).argmin(1) - 1
    accuracy = (nearest == y[test].flatten()).double().mean()
    assert 0.6 < accuracy < 1


def test_only_digits_have_a_display(clips_path: Path) -> None:
    with pytest.raises(DataError, match="display shows digits only"):
        data.with_display(load_clips(clips_path), str(clips_path))


def test_fewer_clips_leave_the_tests_alone(clips_path: Path) -> None:
    experiment = replace(EXPERIMENTS["uni-code"], data=str(clips_path), clips=7)
    clips, every = data.load(experiment), load_clips(clips_path, ["audio", "video"])
    assert clips.rows(PRETRAIN).tolist() == every.rows(PRETRAIN)[:7].tolist()
    assert clips.rows(TRAIN, TEST).tolist() == every.rows(TRAIN, TEST).tolist()
