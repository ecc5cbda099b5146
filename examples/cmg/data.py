"""The generic data file: time-aligned clips of several modalities in one npz.

    <modality>              float [N, T, ..., C]  e.g. audio [N, 10, 128], video [N, 10, 7, 7, 512]
    labels                  int   [N]             event class of the clip
    seg_labels_<modality>   int   [N, T]          class per segment, -1 = background (optional)
    split                   int   [N]             0 pre-train, 1 downstream train, 2 downstream test
    video_box               int   [N, T, 4]       where the event is seen (optional)

The labels of split 0 are never used: they are replaced by -1 when the file is read.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import DataError

PRETRAIN, TRAIN, TEST = 0, 1, 2
BACKGROUND = -1
_CLASSES = 1 << 12  # limit of class numbers: heads have an output for each
_SEGMENTS = "seg_labels_"
_RESERVED = ("labels", "split", "video_box")
_Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Clips:
    """N clips of T segments in several modalities.

    Attributes:
        features: Name -> [N, T, ..., C], float32, or float16 where the file holds float16.
        labels: int64 [N], the class of each clip; -1 in split 0.
        segment_labels: Name -> int64 [N, T], -1 for background and in split 0; may be empty.
        split: int64 [N], one of PRETRAIN, TRAIN and TEST.
        video_box: int64 [N, T, 4] or None.
        num_classes: Number of classes; labels are 0 to num_classes - 1.
    """

    features: dict[str, Tensor]
    labels: Tensor
    segment_labels: dict[str, Tensor]
    split: Tensor
    video_box: Tensor | None
    num_classes: int

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names of the modalities, in order."""
        return tuple(self.features)

    def rows(self, *splits: int) -> Tensor:
        """Indices of the clips in any of `splits`, ascending."""
        return torch.isin(self.split, torch.tensor(splits)).nonzero().squeeze(1)

    def require(self, name: str, segments: int, channels: int, where: str) -> None:
        """Check that a modality has the shape that a model was trained on.

        Raises:
            DataError: The modality is missing, or not [N, segments, ..., channels].
        """
        x = self.features.get(name)
        if x is None or (x.shape[1], x.shape[-1]) != (segments, channels):
            shape = f"[N, {segments}, ..., {channels}]"
            got = "none" if x is None else list(x.shape)
            raise DataError(f"{where}: the model takes {name} {shape}; got {got}.")

    def only(self, names: Iterable[str]) -> Clips:
        """The same clips, in the modalities `names` only."""
        names = tuple(names)
        return replace(
            self,
            features={name: self.features[name] for name in names},
            segment_labels={
                name: self.segment_labels[name] for name in names if name in self.segment_labels
            },
        )


def load_clips(path: str | Path, modalities: Sequence[str] | None = None) -> Clips:
    """Read and check a data file, without pickle.

    Args:
        path: The npz file.
        modalities: The modalities to read, in this order. None reads all: the float arrays of
            three or more dimensions, in file order.

    Raises:
        DataError: The file cannot be read, or an array is missing or malformed.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder, not an npz file" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {what}. Hint: see --data in --help.")
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: not an npz file, or cut short. Hint: write it with numpy.savez.")
    try:
        file = np.load(path, allow_pickle=False)
    except Exception as error:  # zipfile and numpy raise many types for damaged bytes
        raise DataError(f"{path}: the npz file is damaged ({error}).") from error
    with file as arrays:
        return _Reader(path, arrays).clips(modalities)


class _Reader:
    """Reads the arrays of an open npz file and checks each."""

    def __init__(self, path: Path, arrays: Any) -> None:
        self.path = path
        self.arrays = arrays
        self.cache: dict[str, _Array] = {}

    def clips(self, modalities: Sequence[str] | None) -> Clips:
        split = self.split()
        features = self.features(modalities, len(split))
        T = next(iter(features.values())).shape[1]

        labels = self.classes("labels", split, split.shape, lowest=0)
        segment_labels: dict[str, _Array] = {}
        for name in features:
            if (key := _SEGMENTS + name) in self.arrays:
                shape = (len(split), T)
                segment_labels[name] = self.classes(key, split, shape, lowest=BACKGROUND)
        box = None
        if "video_box" in self.arrays:
            box = torch.from_numpy(self.integers("video_box", (len(split), T, 4)).astype(np.int64))
        return Clips(
            features=features,
            labels=torch.from_numpy(labels),
            segment_labels={name: torch.from_numpy(x) for name, x in segment_labels.items()},
            split=torch.from_numpy(split),
            video_box=box,
            num_classes=1 + max(int(x.max()) for x in (labels, *segment_labels.values())),
        )

    def split(self) -> _Array:
        split = self.read("split")
        if split.ndim != 1 or split.dtype.kind not in "iu":
            raise self.error("split", "must be int [N]", split)
        odd = split[(split < 0) | (split > 2)]
        if odd.size:
            raise self.error("split", "must hold only 0, 1 and 2", f"{odd[0]}")
        for number, use in enumerate(("pre-train", "downstream train", "downstream test")):
            if not (split == number).any():
                raise self.error("split", f"must have clips of split {number} ({use})", "none")
        return split.astype(np.int64)

    def features(self, modalities: Sequence[str] | None, N: int) -> dict[str, Tensor]:
        names = self.expected() if modalities is None else tuple(modalities)
        if not names:
            raise DataError(f"{self.path}: has no modality: no float array [N, T, ..., C].")
        repeated = {name for name in names if names.count(name) > 1}
        if repeated:
            raise DataError(f"modalities: each name once; got {' '.join(names)}.")
        features: dict[str, Tensor] = {}
        T = None
        for name in names:
            if "." in name or hasattr(nn.ModuleDict, name):
                rule = "cannot name a modality: torch modules reserve it. Hint: rename the array"
                raise DataError(f"{self.path}: '{name}' {rule}.")
            if name not in self.arrays or self.reserved(name):
                offered = ", ".join(self.offered()) or "none"
                missing = f"no modality '{name}'"
                if modalities is None:
                    missing += f", though the file has {_SEGMENTS}{name}"
                raise DataError(f"{self.path}: {missing}. Modalities in the file: {offered}.")
            array = self.read(name)
            if array.dtype.kind != "f" or array.ndim < 3 or 0 in array.shape:
                raise self.error(name, "must be float [N, T, ..., C], none of them 0", array)
            if len(array) != N:
                raise self.error(name, f"must have N = {N} clips, as split has", array)
            T = T or array.shape[1]
            if array.shape[1] != T:
                raise self.error(name, f"must have T = {T} segments, as {names[0]} has", array)
            with np.errstate(over="ignore"):  # overflow gives Inf, which is refused below
                array = array.astype("=f2" if array.dtype.itemsize == 2 else "=f4", copy=False)
            for n, clip in enumerate(array):
                if not np.isfinite(clip).all():
                    raise self.error(name, "must be finite", f"NaN or Inf in clip {n}")
            features[name] = torch.from_numpy(array)
        return features

    def offered(self) -> tuple[str, ...]:
        """Names of the arrays that may be modalities."""
        return tuple(
            name
            for name in self.arrays.files
            if not self.reserved(name) and self.looks_like_features(name)
        )

    def looks_like_features(self, name: str) -> bool:
        """Whether an array is float with three dimensions or more; False if unreadable."""
        try:
            array = self.read(name)
        except DataError:
            return False
        return array.dtype.kind == "f" and array.ndim >= 3

    def expected(self) -> tuple[str, ...]:
        """Names of the arrays that may be modalities, or that have segment labels."""
        offered = self.offered()
        described = [x.removeprefix(_SEGMENTS) for x in self.arrays if x.startswith(_SEGMENTS)]
        return (*offered, *(name for name in described if name not in offered))

    @staticmethod
    def reserved(name: str) -> bool:
        return name in _RESERVED or name.startswith(_SEGMENTS)

    def classes(self, name: str, split: _Array, shape: tuple[int, ...], *, lowest: int) -> _Array:
        """The labels of splits 1 and 2, checked; -1 in split 0, whose labels are ignored."""
        labelled = split != PRETRAIN
        known = self.integers(name, shape)[labelled]
        odd = known[(known < lowest) | (known >= _CLASSES)]
        if odd.size:
            rule = f"must be {lowest} to {_CLASSES - 1} in splits 1 and 2"
            raise self.error(name, rule, f"{odd[0]}. Hint: number the classes from 0")
        classes = np.full(shape, -1)
        classes[labelled] = known
        if len(shown := np.unique(classes[split == TRAIN])) < 2:
            raise self.error(name, "must have two classes or more in split 1", f"only {shown[0]}")
        return classes

    def integers(self, name: str, shape: tuple[int, ...]) -> _Array:
        array = self.read(name)
        if array.dtype.kind not in "iu" or array.shape != shape:
            raise self.error(name, f"must be int {list(shape)}", array)
        return array

    def read(self, name: str) -> _Array:
        if name not in self.arrays:
            found = ", ".join(self.arrays.files) or "nothing"
            raise DataError(f"{self.path}: array '{name}' is missing. Arrays: {found}.")
        if name not in self.cache:
            try:
                array = self.arrays[name]
            except Exception as error:  # also MemoryError: a header may claim any size
                hint = " Hint: pad clips to one T." if "Object arrays" in str(error) else ""
                raise DataError(f"{self.path}: {name}: cannot be read ({error}).{hint}") from error
            if not isinstance(array, np.ndarray):
                raise DataError(f"{self.path}: {name}: must be a numpy array; got other bytes.")
            self.cache[name] = array
        return self.cache[name]

    def error(self, name: str, rule: str, got: _Array | str) -> DataError:
        if not isinstance(got, str):
            got = f"{got.dtype}{list(got.shape)}"
        return DataError(f"{self.path}: {name}: {rule}; got {got}.")
