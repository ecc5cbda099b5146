"""A finished run: the same codes as when it was trained."""

from __future__ import annotations

from pathlib import Path

import cmg_pretrain
import pytest
import torch

from cmg.data import Clips, load_clips
from cmg.errors import DataError
from cmg.run import TrainedRun


def test_a_loaded_run_quantizes_as_the_trained_one_did(clips_path: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(clips_path), "--epochs", "2", "--output", str(tmp_path)]
    args = cmg_pretrain._parse([*arguments, "--modalities", "audio", "video", "--without", "club"])
    seen = []
    original = cmg_pretrain.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cmg_pretrain, "evaluate", lambda codes, *a: seen.append(codes) or original(codes, *a)
        )
        cmg_pretrain.run(args)
    clips = load_clips(clips_path, ["audio", "video"])
    run = TrainedRun.load(tmp_path, clips, seed=0)
    codes, indices = run.codes
    assert run.config.without == ("club",)
    assert list(codes) == ["audio", "video"]
    rows = clips.rows(1, 2)
    for name, x in codes.items():
        torch.testing.assert_close(x[rows], seen[0][name][rows], rtol=0, atol=0)
        torch.testing.assert_close(x, run.model.quantizer.codebook[indices[name]], rtol=0, atol=0)
    assert not any(p.requires_grad for p in run.model.parameters())
    one, _ = run.quantize({"video": clips.features["video"][:3]})
    torch.testing.assert_close(one["video"], codes["video"][:3])
    with pytest.raises(DataError, match="the model takes audio"):
        TrainedRun.load(tmp_path, clips.only(["video"]), seed=0)


def test_a_folder_without_a_model_is_refused(clips: Clips, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        TrainedRun.load(tmp_path, clips, seed=0)
