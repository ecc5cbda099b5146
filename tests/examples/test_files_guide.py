"""The guide from files to codes: each of its blocks, in order, on a small folder of videos."""

from __future__ import annotations

import importlib
import shlex
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from media_files import beeps, captions, film
from support import ROOT
from test_habits import FENCE, IN_ORDER

from cmg.data import load_clips
from cmg.model import UniCode

CLASSES = ("low", "high")
GUIDE = ROOT / "docs/guides/files-to-codes.md"


def make_videos(folder: Path, names: list[str]) -> None:
    """Films of two seconds of two classes, with captions."""
    for k, name in enumerate(names):
        kind = k % 2
        pitch = beeps(2, 16_000) if kind else beeps(2, 16_000)[::-1].copy()
        grey = np.full((48, 64, 3), 60 + 120 * kind, np.uint8)
        film(folder / "clips" / f"{name}.mp4", 2, fps=4, shown=lambda _, g=grey: g, sound=pitch)
        captions(folder, name, [f"a {CLASSES[kind]} sound, number {k}"])


def run(command: str) -> int:
    """A command of the guide, with one epoch where it trains."""
    python, script, *arguments = shlex.split(command)
    assert python == "python"
    if script.endswith("cmg_pretrain.py"):
        arguments += ["--epochs", "1"]
    return importlib.import_module(Path(script).stem).main(arguments)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder after all blocks, and the names that they defined."""
    folder, text = tmp_path_factory.mktemp("guide"), GUIDE.read_text()
    assert text.startswith(IN_ORDER)
    names = [f"{k:02d}" for k in range(16)]
    make_videos(folder / "videos", names)
    rows = [f"{name},{CLASSES[int(name) % 2]}" for name in names]
    (folder / "videos" / "clips.csv").write_text("\n".join(["id,label", *rows]) + "\n")
    make_videos(folder / "new-videos", ["x", "y"])
    space: dict[str, Any] = {"__name__": "__main__"}
    commands = 0
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter
        patch.chdir(folder)
        for block in FENCE.finditer(text):
            if block[1] == "python":
                exec(compile(block[2], str(GUIDE), "exec"), space)
            for line in block[2].splitlines() if block[1] == "bash" else ():
                if not line.startswith("pip "):
                    commands += 1
                    assert run(line) == 0, line
    assert commands == 4
    return folder, space


def test_files_are_made_as_the_guide_says(done: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = done
    clips = load_clips(folder / "store")
    assert clips.modalities == ("audio", "video", "text")
    assert clips.valid("video").sum() == 16 * 2
    assert sorted(clips.split.tolist()) == [0] * 8 + [1] * 4 + [2] * 4
    rows = pq.read_table(folder / "tokens.parquet").to_pylist()
    assert len(rows) == 16 * 3
    assert {row["label"] for row in rows} <= set(CLASSES)
    model = UniCode.from_pretrained(folder / "run")
    tokens = model.tokens(clips.features, clips.masks)
    for row in rows:
        k = clips.ids.index(row["id"])
        assert row["tokens"] == tokens[row["modality"]][k].tolist()
        assert row["mask"] == clips.valid(row["modality"])[k].tolist()


def test_media_files_are_encoded_as_those_of_training(done: tuple[Path, dict[str, Any]]) -> None:
    """The first two videos of training and the new ones are the same but for captions."""
    folder, _ = done
    old = pq.read_table(folder / "tokens.parquet").to_pylist()
    new = pq.read_table(folder / "new.parquet").to_pylist()
    assert {row["id"] for row in new} == {"x", "y"}
    assert len(new) == 2 * 3
    old = {(row["id"], row["modality"]): row["tokens"] for row in old}
    for row in new:
        if row["modality"] != "text":
            assert row["tokens"] == old["00" if row["id"] == "x" else "01", row["modality"]]


def test_what_the_python_blocks_made(done: tuple[Path, dict[str, Any]]) -> None:
    _, names = done
    assert len(names["best"][0]) == 3
    assert torch.from_numpy(names["served"]).shape == (2, 10)
    assert torch.isfinite(names["loss"])
    sounds = names["classes"]["video"]
    assert set(sounds.label.tolist()) <= {0, 1}


def test_one_segment_a_clip(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """No time axis: T = 1."""
    videos = shlex.quote(str(done[0] / "videos"))
    store, folder = shlex.quote(str(tmp_path / "store")), shlex.quote(str(tmp_path / "run"))
    fast = "--video patches --audio log-mel --text n-grams"
    options = f"--output {store} --segments 1 --seconds 2 {fast}"
    assert run(f"python examples/cmg_features.py {videos} {options}") == 0
    assert run(f"python examples/cmg_pretrain.py --data {store} --output {folder}") == 0
    model = UniCode.from_pretrained(tmp_path / "run")
    clips = load_clips(tmp_path / "store")
    assert model.tokens(clips.features)["audio"].shape == (16, 1)


def test_a_folder_without_labels(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """From videos alone to tokens."""
    names = [f"{k}" for k in range(24)]
    make_videos(tmp_path / "videos", names)
    videos, store = (shlex.quote(str(tmp_path / x)) for x in ("videos", "store"))
    folder, output = (shlex.quote(str(tmp_path / x)) for x in ("run", "tokens.parquet"))
    fast = "--video patches --audio log-mel --text n-grams --segments 2 --seconds 2"
    assert run(f"python examples/cmg_features.py {videos} --output {store} {fast}") == 0
    assert run(f"python examples/cmg_pretrain.py --data {store} --output {folder}") == 0
    assert run(f"python examples/cmg_encode.py {folder} --data {store} --output {output}") == 0
    table = pq.read_table(tmp_path / "tokens.parquet")
    assert table.column_names == ["id", "modality", "tokens", "mask", "label", "probability"]
    assert table["label"].null_count == len(table)
    assert len(table) == 24 * 3
