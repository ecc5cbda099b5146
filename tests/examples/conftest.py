"""A tiny data file of three modalities that show the same events."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import cmg_pretrain
import numpy as np
import pytest

from cmg.clips import Clips
from cmg.data import load_clips

N, T, CLASSES = 120, 4, 3
Arrays = dict[str, np.ndarray]


def make_arrays(seed: int = 0) -> Arrays:
    """A segment is background or its clip's event; each modality maps it linearly, with noise."""
    rng = np.random.default_rng(seed)
    split = np.repeat([0, 1, 2], [60, 40, 20])
    labels = np.arange(N) % CLASSES
    segments = np.where(rng.random((N, T)) < 0.6, labels[:, None], -1)
    segments[:, 0] = labels
    shown = np.eye(CLASSES + 1)[segments]  # [N, T, classes + 1]

    def features(*shape: int) -> np.ndarray:
        x = (shown @ rng.normal(size=(CLASSES + 1, shape[-1]))).reshape(
            N, T, *[1] * (len(shape) - 1), shape[-1]
        )
        return x + 0.1 * rng.normal(size=(N, T, *shape))

    arrays = {
        "audio": features(12).astype(np.float32),
        "video": features(2, 2, 6).astype(np.float16),
        "text": features(9),
        "labels": np.where(split == 0, -7, labels).astype(np.int32),  # -7: must never be read
        "split": split.astype(np.int8),
        "video_box": rng.integers(0, 56, (N, T, 4)).astype(np.int16),
    }
    truth = np.where(split[:, None] == 0, 99, segments)
    return arrays | {f"seg_labels_{m}": truth.copy() for m in ("audio", "video", "text")}


def before_call(
    number: int, act: Callable[[], object], function: Callable[..., Any]
) -> Callable[..., Any]:
    """The function, but `act` is called before its call of this number."""
    calls = itertools.count(1)

    def called(*arguments: Any) -> Any:
        if next(calls) == number:
            act()
        return function(*arguments)

    return called


def interrupt() -> NoReturn:
    raise KeyboardInterrupt


@pytest.fixture
def arrays() -> Arrays:
    """The arrays of a good file, free to be spoilt."""
    return make_arrays()


@pytest.fixture(scope="session")
def clips_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good file."""
    path = tmp_path_factory.mktemp("data") / "clips.npz"
    np.savez(path, **make_arrays())
    return path


@pytest.fixture
def clips(clips_path: Path) -> Clips:
    """Its clips."""
    return load_clips(clips_path)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command line with arguments that it must refuse; the one line that it ends with.

    Warnings about the data come before it.
    """

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert cmg_pretrain.main(list(map(str, arguments))) == 2
        lines = capsys.readouterr().err.splitlines()
        (line,) = (x for x in lines if not x.startswith("warning: "))
        assert line.startswith("cmg_pretrain: ")
        return line

    return run
