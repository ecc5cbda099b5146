"""Warnings: each where it is due, and none about a good run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cmg_pretrain
import numpy as np
import pytest
import torch
from examples.conftest import Arrays

from cmg.advice import about_data, about_run
from cmg.batches import Batches
from cmg.clips import Clips
from cmg.data import load_clips
from cmg.model import Config, UniCode


def load(folder: Path, arrays: Arrays) -> Clips:
    np.savez(folder / "clips.npz", **arrays)
    return load_clips(folder / "clips.npz")


def more_test_clips(arrays: Arrays) -> Arrays:
    arrays["split"][40:60] = 2
    arrays["labels"] = np.arange(120) % 3
    for name in ("audio", "video", "text"):
        arrays[f"seg_labels_{name}"] = np.repeat(arrays["labels"][:, None], 4, 1)
    return arrays


def one_class(arrays: Arrays) -> None:
    arrays["labels"][arrays["split"] == 2] = 1


def no_labels(arrays: Arrays) -> None:
    arrays["labels"][(arrays["split"] == 1) & (arrays["labels"] == 2)] = 0


def apart(arrays: Arrays) -> None:
    early = np.broadcast_to(np.arange(4) < 2, (120, 4))
    arrays |= {"mask_audio": early.copy(), "mask_video": ~early}


DATA: dict[str, tuple[Callable[[Arrays], object], str]] = {
    "one class": (one_class, "video: split 2 has a single class"),
    "no labels": (no_labels, "text: no clip of split 1 has a label of class 2, but"),
    "apart": (apart, "audio and video are never valid at the same segment in split 0"),
}


@pytest.mark.parametrize("case", DATA)
def test_data_that_scores_say_little_about(tmp_path: Path, arrays: Arrays, case: str) -> None:
    spoil, message = DATA[case]
    arrays = more_test_clips(arrays)
    assert about_data(load(tmp_path, arrays)) == []
    spoil(arrays)
    assert any(message in text for text in about_data(load(tmp_path, arrays)))


def test_few_clips_have_a_large_error(clips: Clips) -> None:
    (audio, *_) = about_data(clips)
    assert audio.startswith("audio: split 2 has only 20 clips")
    assert "up to 11 points" in audio  # .5 / sqrt(20)


def metrics(perplexity: float) -> dict[str, Any]:
    use = {"used": 9, "perplexity": perplexity}
    return {"codebook": {"per_modality": {"audio": use, "video": {"used": 9, "perplexity": 8.0}}}}


def test_a_run_that_went_wrong() -> None:
    good = {"cpc": [4.0, 1.0], "contrast": [4.0, 1.0], "club": [0.1, 0.05]}
    assert about_run(metrics(7.0), good, 64, {}) == []
    (collapse,) = about_run(metrics(1.3), good, 64, {})
    assert collapse.startswith("codebook collapse: audio uses 9 codes (perplexity 1.3)")
    for term in ("cpc", "contrast"):
        chance = good | {term: [math.log(64)] * 2}
        (text,) = about_run(metrics(7.0), chance, 64, {})
        assert "is at chance: its loss is 4.16 of ln 64 = 4.16 nats" in text
    (text,) = about_run(metrics(7.0), good | {"club": [0.7]}, 64, {})
    assert "still predict 70%" in text
    (text,) = about_run(metrics(7.0), good | {"club": [30.0]}, 64, {"audio": 0.9, "video": 0.1})
    assert text.startswith("CLUB of audio is at its bound: 90%")
    assert about_run(metrics(7.0), {"reconstruction": [1.0]}, 64, {}) == []  # --without the others


def test_saturation_is_the_share_of_log_variances_at_the_bound() -> None:
    x = {"audio": torch.randn(8, 4, 1, 7), "video": torch.randn(8, 4, 1, 5)}
    batches = Batches(Clips.of(x))
    model = UniCode(Config.of(batches, codebook_size=8, club="bound"))
    assert model.club_saturation(batches, torch.arange(8)) == {"audio": 0.0, "video": 0.0}
    half = model.club["audio"].p_logvar[-1].bias
    with torch.no_grad():
        half[: len(half) // 2] = 1e4
    assert model.club_saturation(batches, torch.arange(8)) == {"audio": 0.5, "video": 0.0}


def test_the_command_line_warns(
    clips_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(clips_path), "--epochs", "1", "--output", str(tmp_path)]
    assert cmg_pretrain.main(arguments) == 0
    assert "warning: audio: split 2 has only 20 clips" in capsys.readouterr().err
