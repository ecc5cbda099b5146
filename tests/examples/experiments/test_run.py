"""A finished run: the same codes as when it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cmg_pretrain
import pytest
import torch
from support import peak_growth

from cmg.checkpoint import load_model, save_model
from cmg.clips import Clips
from cmg.data import load_clips
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


@pytest.fixture(scope="module")
def finished(clips_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("finished")
    arguments = ["--data", str(clips_path), "--epochs", "1", "--output", str(folder)]
    assert cmg_pretrain.main([*arguments, "--modalities", "audio", "video"]) == 0
    return folder


CONFIGS: list[dict[str, Any]] = [
    {"dim": 10**9},
    {"dim": 10**30},
    {"codebook_size": 10**9},
    {"codebook_size": "many"},
    {"width": 10**9},
    {"heads": 0},
    {"specific_dim": -1},
    {"shapes": {"audio": [1, 10**9], "video": [4, 6]}},
    {"shapes": {"": [1, 12], "video": [4, 6]}},
    {"shapes": []},
    {"shapes": None},
    {"without": 3},
    {"more": 1},
]


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_a_config_that_does_not_fit_the_file_is_refused(
    finished: Path, clips: Clips, tmp_path: Path, changes: dict[str, Any]
) -> None:
    tensors, config = load_model(finished)
    save_model(tmp_path, tensors, config | changes)
    with pytest.raises(DataError, match="of another version of this example, or damaged") as error:
        TrainedRun.load(tmp_path, clips, seed=0)
    assert "\n" not in str(error.value)


def test_a_config_that_asks_for_more_than_the_file_has_takes_no_memory(
    finished: Path, clips_path: Path, tmp_path: Path
) -> None:
    tensors, config = load_model(finished)
    parts = {"cpc": {"num_steps": 10**9}, "specific_dim": 10**7}
    for name, changes in (("dim", {"dim": 10**8}), ("others", parts)):
        save_model(tmp_path / name, tensors, config | changes)
    setup = (
        "import sys; sys.path.insert(0, 'examples')\n"
        "from cmg.run import TrainedRun; from cmg.errors import DataError\n"
        f"from cmg.data import load_clips; clips = load_clips({str(clips_path)!r})"
    )
    call = (
        f"try: TrainedRun.load({str(tmp_path / 'dim')!r}, clips, 0)\n"
        "except DataError as e: said = e\n"
        f"assert said; TrainedRun.load({str(tmp_path / 'others')!r}, clips, 0)"
    )
    assert peak_growth(setup, call) < 100  # MiB


@pytest.mark.parametrize(
    "name",
    ["semantic.audio.attend.weight", "quantizer.ema_codebook.codes", "standardizer/mean/video"],
)
def test_a_model_that_is_not_finite_or_whole_is_refused(
    finished: Path, clips: Clips, tmp_path: Path, name: str
) -> None:
    tensors, config = load_model(finished)
    save_model(tmp_path, {**tensors, name: tensors[name] * torch.nan}, config)
    with pytest.raises(DataError, match=f"{name} is not finite"):
        TrainedRun.load(tmp_path, clips, seed=0)
    for odd in ({}, {name: tensors[name][:1]}, {name: torch.zeros(0)}):
        save_model(tmp_path, {k: x for k, x in tensors.items() if k != name} | odd, config)
        with pytest.raises(DataError, match="of another version of this example, or damaged"):
            TrainedRun.load(tmp_path, clips, seed=0)
