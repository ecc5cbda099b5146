"""A tiny data file of three modalities that show the same events."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

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
