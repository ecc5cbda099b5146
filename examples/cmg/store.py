"""Write a data set as a folder of .npy files, see `data`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .clips import Clips, check_finite
from .containers import CLIPS_AT_ONCE, Array, write_features
from .data import MASK, META, SEGMENTS, Meta
from .errors import DataError
from .files import new_folder


def write_store(folder: str | Path, clips: Clips) -> None:
    """Write clips as a new folder, with features in float16.

    The folder appears under its name when it is complete. Features are read and written a few clips
    at a time.

    Args:
        folder: The folder to create.
        clips: The clips. Labels of split 0 are written as -1.

    Raises:
        DataError: The folder exists or cannot be written to, or features do not fit float16.
    """
    with new_folder(folder) as partial:
        for name in clips.modalities:
            _write_features(partial / f"{name}.npy", clips, name)
        for name, array in _small_arrays(clips).items():
            np.save(partial / f"{name}.npy", array, allow_pickle=False)
        meta = Meta(
            modalities=clips.modalities,
            encoders=clips.encoders,
            class_names=clips.class_names,
            seconds=clips.seconds,
        )
        (partial / META).write_text(json.dumps(asdict(meta), indent=2) + "\n", encoding="utf-8")


def _write_features(path: Path, clips: Clips, name: str) -> None:
    def parts() -> Iterator[Tensor]:
        for rows in torch.arange(len(clips.split)).split(CLIPS_AT_ONCE):
            x = clips.read(name, rows)
            if 0 < x.abs().amax() < torch.finfo(torch.float16).smallest_normal:
                raise DataError(f"{name}: too small for float16. Hint: scale the features.")
            check_finite(f"{name} in float16", half := x.half(), rows)
            yield half

    with path.open("xb") as file:
        write_features(file, clips.features[name].shape, parts(), f"writing {name}")


def _small_arrays(clips: Clips) -> Mapping[str, Array]:
    arrays: dict[str, Tensor] = {"labels": clips.labels, "split": clips.split.to(torch.int8)}
    arrays |= {SEGMENTS + name: x for name, x in clips.segment_labels.items()}
    arrays |= {MASK + name: x for name, x in clips.masks.items()}
    if clips.video_box is not None:
        arrays["video_box"] = clips.video_box
    ids = {"ids": np.array(clips.ids)} if clips.ids else {}
    return {name: x.numpy() for name, x in arrays.items()} | ids
