"""The command line: what it writes, what it prints, what it refuses."""

from __future__ import annotations

import errno
import json
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cmg_pretrain
import numpy as np
import pytest
import torch
from examples.conftest import Arrays, before_call, interrupt
from support import PATHS, run_python

import cmg
from cmg import files
from cmg.checkpoint import load_checkpoint, load_model, save_checkpoint
from cmg.training import CHECKPOINT, Trainer

RESULTS = {
    "metrics.json",
    "model.safetensors",
    "config.json",
    "codes.png",
    "training.png",
    CHECKPOINT,
}
Refused = Callable[..., str]


def save(path: Path, arrays: Arrays) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_a_run_from_file_to_figures(
    clips_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three events shown linearly by three modalities: labels must carry over."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "downstream.json").write_text("{}")  # an earlier run's
    arguments = ["--data", str(clips_path), "--epochs", "40", "--seed", "3", "--reference", "cca"]
    assert cmg_pretrain.main([*arguments, "--output", str(out)]) == 0
    assert {path.name for path in out.iterdir() if path.is_file()} == RESULTS

    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["dataset"] == "clips"
    assert metrics["modalities"] == ["audio", "video", "text"]
    assert (metrics["seed"], metrics["epochs"]) == (3, 40)
    assert metrics["seconds"] > 0
    for task in ("classification", "localization"):
        assert len(metrics[task]) == 6
    for way, scores in metrics["classification"].items():
        assert set(scores) == {"accuracy", "chance", "upper_bound", "token_accuracy"}
        assert set(metrics["agreement"][way]) == {"share", "chance"}
    mean = sum(way["accuracy"] for way in metrics["classification"].values()) / 6
    assert mean > 0.8  # chance is 0.35; a head that ignores its input cannot pass
    assert set(metrics["codebook"]["per_modality"]) == {"audio", "video", "text"}

    tensors, config = load_model(out)
    assert config == json.loads((out / "config.json").read_text())
    assert tensors["quantizer.ema_codebook.codes"].shape == (config["codebook_size"], config["dim"])
    assert tensors["standardizer/mean/video"].shape == (6,)

    printed = capsys.readouterr().out
    titles = ("upper bound", "of bound", "CCA", "codes in use", "tokens", "same code", "by chance")
    for text in ("audio->video", "text->audio", *titles):
        assert text in printed


def test_some_modalities_without_some_parts(clips_path: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(clips_path), "--epochs", "2", "--output", str(tmp_path)]
    parts = ["--without", "club", "cpc", "mm-ema", "reset", "matching"]
    assert cmg_pretrain.main([*arguments, "--modalities", "text", "audio", *parts]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["modalities"] == ["text", "audio"]
    assert set(metrics["classification"]) == {"text->audio", "audio->text"}
    assert load_model(tmp_path)[1]["without"] == sorted(parts[1:])


def test_labels_of_pretraining_clips_change_nothing(arrays: Arrays, tmp_path: Path) -> None:
    weights = []
    for i, label in enumerate((0, 1)):
        arrays["labels"][arrays["split"] == 0] = label
        path = save(tmp_path / f"{i}.npz", arrays)
        assert cmg_pretrain.main(["--data", path, "--epochs", "2", "--output", str(tmp_path)]) == 0
        weights.append(load_model(tmp_path)[0])
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: a.pop("labels"), "array 'labels' is missing"),
        (lambda a: a["text"].__setitem__((5, 1, 2), np.nan), "text: must be finite"),
        (lambda a: [a.pop(m) for m in ("audio", "video")], "no modality 'audio'"),
        (lambda a: a.update({"left.arm": a["text"]}), "'left.arm' cannot name a modality"),
        (lambda a: a.update(type=a["text"]), "'type' cannot name a modality"),
        (lambda a: a.pop("text"), "no modality 'text', though the file has seg_labels_text"),
    ],
)
def test_bad_data_is_one_line_and_leaves_nothing(
    arrays: Arrays,
    tmp_path: Path,
    refused: Refused,
    spoil: Callable[[Arrays], object],
    message: str,
) -> None:
    spoil(arrays)
    out = tmp_path / "out"
    assert message in refused("--data", save(tmp_path / "x.npz", arrays), "--output", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.npz"], "no such file"),
        (["--data", "."], "has no .npy files, so it is not a data set"),
        (["--data", "ave"], "ave:: ROOT in ave:ROOT must be a folder with visual_feature.h5 audio"),
        (["--modalities", "audio"], "two modalities or more; got audio"),
        (["--modalities", "audio", "smell"], "no modality 'smell'"),
        (["--device", "abacus"], "--device abacus: torch cannot use it here"),
        (["--device", "meta"], "--device meta: torch cannot use it here"),
        (["--resume"], "no such file"),
    ],
)
def test_bad_arguments_are_one_line(
    clips_path: Path, tmp_path: Path, refused: Refused, arguments: list[str], message: str
) -> None:
    assert message in refused("--data", clips_path, "--output", tmp_path / "out", *arguments)


def test_an_output_that_cannot_be_written_is_said_at_once(
    clips_path: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    assert f"{out}: cannot be written into" in refused("--data", clips_path, "--output", out)


def rename(arrays: Arrays) -> None:
    """Two modalities get other names."""
    for name in ("audio", "video"):
        arrays[f"other {name}"] = arrays.pop(name)
        del arrays[f"seg_labels_{name}"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: a.update({m: x[:, :3] for m, x in a.items() if x.ndim > 1}), "[N, 4, ..., 12]"),
        (lambda a: a.update(audio=a["audio"][..., :7]), "takes audio [N, 4, ..., 12]"),
        (lambda a: a.pop("text"), "no modality 'text'"),
        (rename, "must have two of audio video text or more"),
        (None, "no such file"),
    ],
)
def test_a_downstream_set_that_does_not_fit_is_said_before_training(
    clips_path: Path,
    arrays: Arrays,
    tmp_path: Path,
    refused: Refused,
    spoil: Callable[[Arrays], object] | None,
    message: str,
) -> None:
    other = tmp_path / "x.npz"
    if spoil is not None:
        spoil(arrays)
        save(other, arrays)
    out = tmp_path / "out"
    assert message in refused("--data", clips_path, "--output", out, "--downstream", other)
    assert not out.exists()


def test_a_run_that_is_stopped_says_how_to_go_on(
    clips_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["--data", str(clips_path), "--epochs", "3", "--output", str(tmp_path)]
    with monkeypatch.context() as user:
        user.setattr(Trainer, "_step", before_call(2, interrupt, Trainer._step))
        assert cmg_pretrain.main(arguments) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "cmg_pretrain: stopped. Hint: --resume continues after the last complete epoch."
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {CHECKPOINT}
    assert cmg_pretrain.main([*arguments, "--resume"]) == 0


def test_a_run_that_is_stopped_before_its_first_checkpoint_says_so(
    clips_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Trainer, "_train_epoch", before_call(1, interrupt, Trainer._train_epoch))
    assert cmg_pretrain.main(["--data", str(clips_path), "--output", str(tmp_path)]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        "cmg_pretrain: stopped before the end of the first epoch; there is nothing to resume."
    )


def test_a_folder_in_use_is_refused(clips_path: Path, tmp_path: Path, refused: Refused) -> None:
    """And free again when the run that held it is killed."""
    pytest.importorskip("fcntl")
    hold = (
        "import sys, time, pathlib; from cmg.files import in_use\n"
        "with in_use(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": PATHS}
    (tmp_path / ".codes.png.0123456789abcdef.partial").touch()
    arguments = ["--data", clips_path, "--epochs", 1, "--output", tmp_path]
    with subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path], stdout=subprocess.PIPE, env=environment
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert list(tmp_path.iterdir()) == []  # what a killed write left is removed
        assert refused(*arguments).startswith(f"cmg_pretrain: {tmp_path}: in use by another run.")
        assert list(tmp_path.iterdir()) == []
        other.kill()
    assert cmg_pretrain.main(list(map(str, arguments))) == 0


def test_two_runs_into_one_folder_are_not_mixed(
    clips_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second begins while the first trains."""
    pytest.importorskip("fcntl")
    arguments = ["--data", str(clips_path), "--epochs", "2", "--output", str(tmp_path)]
    codes = []

    def second() -> None:
        codes.append(cmg_pretrain.main([*arguments, "--seed", "1"]))

    monkeypatch.setattr(Trainer, "_train_epoch", before_call(2, second, Trainer._train_epoch))
    assert cmg_pretrain.main(arguments) == 0
    assert codes == [2]
    assert "in use by another run" in capsys.readouterr().err
    assert json.loads((tmp_path / "metrics.json").read_text())["seed"] == 0


def test_a_folder_without_locks_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files, "_flock", refuse)
    with files.in_use(tmp_path), files.in_use(tmp_path):
        pass


def test_arrays_that_nobody_asked_for_do_not_matter(arrays: Arrays, tmp_path: Path) -> None:
    arrays["names"] = np.array([{"any": "object"}] * 120)
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    assert cmg_pretrain.main(["--data", str(path), "--epochs", "1", "--output", str(tmp_path)]) == 0


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"needs sklearn\..*mmvq\[examples\]"):
        runpy.run_path(cmg.__file__)


def test_another_file_of_the_same_name_does_not_resume(
    arrays: Arrays, tmp_path: Path, refused: Refused
) -> None:
    arguments = ["--data", save(tmp_path / "x.npz", arrays), "--epochs", "2"]
    arguments += ["--output", str(tmp_path / "out")]
    assert cmg_pretrain.main(arguments) == 0
    arrays["text"][:] *= np.linspace(1, 2, arrays["text"].shape[-1])
    save(tmp_path / "x.npz", arrays)
    assert "of another run: data was x " in refused(*arguments, "--resume")


@pytest.mark.parametrize("epochs", ["0", "-1", "many"])
def test_epochs_are_counted_from_one(epochs: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cmg_pretrain.main(["--epochs", epochs])
    assert "--epochs" in capsys.readouterr().err


def test_a_killed_run_resumes_to_the_same_bits() -> None:
    """SIGKILL at three random moments; the script kills as often as it is asked to."""
    script = str(Path(__file__).with_name("kill_and_resume.py"))
    found = run_python(script, "--kills", "3", "--epochs", "8")
    assert sum(int(line.split(": ")[1]) for line in found.splitlines()[:-1]) == 3


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    clips_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["--data", str(clips_path), "--epochs", "3", "--output", str(tmp_path)]

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", before_call(2, full, os.fsync))
        assert cmg_pretrain.main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"cmg_pretrain: {tmp_path / CHECKPOINT}: cannot be written")
    assert "No space left on device" in error
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {CHECKPOINT}
    assert load_checkpoint(tmp_path / CHECKPOINT)["epoch"] == 1
    assert cmg_pretrain.main([*arguments, "--resume"]) == 0


def test_a_spoilt_checkpoint_is_one_line(
    clips_path: Path, tmp_path: Path, refused: Refused
) -> None:
    """Nothing is written over it, so that whoever looks into it finds it as it was."""
    arguments = ["--data", str(clips_path), "--epochs", "1", "--output", str(tmp_path)]
    assert cmg_pretrain.main(arguments) == 0
    path = tmp_path / CHECKPOINT
    state, content = load_checkpoint(path), path.read_bytes()

    def torn() -> None:
        path.write_bytes(content[:-100])

    def foreign() -> None:
        save_checkpoint(path, {**state, "model": {"x": torch.zeros(2)}})

    def incomplete() -> None:
        save_checkpoint(path, {"identity": state["identity"]})

    def flipped() -> None:
        path.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])

    def with_text() -> None:
        save_checkpoint(path, {**state, "epoch": "one"})

    def with_history() -> None:
        save_checkpoint(path, {**state, "history": {"cpc": [1.0, 2.0]}})

    def with_nan() -> None:
        weights = {
            name: x * math.nan for name, x in state["model"].items() if x.is_floating_point()
        }
        save_checkpoint(path, {**state, "model": state["model"] | weights})

    fits = "the checkpoint does not fit"
    for spoil, message in (
        (torn, "damaged"),
        (flipped, "damaged: its checksum is"),
        (foreign, fits),
        (incomplete, fits),
        (with_text, "its epoch is 'one'"),
        (with_history, "its history is longer than 1 epochs"),
        (with_nan, "is not finite"),
    ):
        spoil()
        spoilt = path.read_bytes()
        line = refused(*arguments, "--resume")
        assert f"{path}: " in line
        assert message in line
        assert path.read_bytes() == spoilt
