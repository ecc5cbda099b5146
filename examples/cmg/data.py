"""The data set: time-aligned clips of several modalities, as PATH.npz or as a folder of .npy files.

    <modality>              float [N, T, ..., C]  e.g. audio [N, 10, 128], video [N, 10, 7, 7, 512]
    labels                  int   [N]             event class of the clip
    split                   int   [N]             0 pre-train, 1 downstream train, 2 test,
                                                  3 validation: chooses the number of codes, as
                                                  split 1 does without it (optional)
    seg_labels_<modality>   int   [N, T]          class per segment, -1 = background (optional)
    mask_<modality>         bool  [N, T]          True = valid; all False where a clip does not have
                                                  the modality (optional)
    video_box               int   [N, T, 4]       where the event is seen (optional)
    ids                     text  [N]             names of the clips (optional)

Without labels there are codes, but no classifiers: all clips are in split 0, or the arrays labels,
split and seg_labels_<modality> are missing.

A folder has <name>.npy for each, and optionally meta.json with "version" (1), "modalities" (names),
"encoders" (modality -> name), "class_names" and "seconds" (of a clip). Features in a folder are
read batch by batch, so that they may be larger than memory. Without "modalities" every float array
of three or more dimensions is one. Other arrays are listed and not used. A data set of Hugging Face
`datasets` has a column for each, and class names if the column labels is a ClassLabel.

The labels of split 0 are never used: they are replaced by -1 when the file is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from .clips import (
    BACKGROUND,
    MOST_CLASSES,
    PRETRAIN,
    SPLITS,
    TRAIN,
    VALIDATION,
    Clips,
    check_finite,
    only_valid,
)
from .containers import Array, Arrays, Folder, Header, NpzFile, Rows
from .errors import DataError

META, VERSION = "meta.json", 1
SEGMENTS, MASK = "seg_labels_", "mask_"
_RESERVED = ("labels", "split", "video_box", "ids")
_LARGEST_META = 1 << 24  # bytes
Labels = Literal["required", "optional", "ignored"]


def load_clips(
    path: str | Path, modalities: Sequence[str] | None = None, labels: Labels = "required"
) -> Clips:
    """Read and check a data set, without pickle.

    Args:
        path: The npz file, or the folder of .npy files. Features of a folder are left on disk.
        modalities: The modalities to read, in this order. None reads all, in the order of the file
            or of meta.json.
        labels: "required", or for training "optional": data in which nothing is labelled are read
            too, as clips of split 0. "ignored", for a model that is trained: the arrays that
            describe clips are not read, except for masks and ids, and all clips are of split 0.

    Raises:
        DataError: The data cannot be read, or an array is missing or malformed.
    """
    path = Path(path)
    if path.is_dir():
        folder = Folder(path)
        if not folder.names:
            rule = "has no .npy files, so it is not a data set"
            hint = "of media files, cmg_features.py makes one; for the format, see --help"
            raise DataError(f"{path}: {rule}. Hint: {hint}.")
        return read_clips(folder, read_meta(path), modalities, labels)
    return read_clips(NpzFile(path), Meta(), modalities, labels)


def read_clips(
    arrays: Arrays,
    meta: Meta,
    modalities: Sequence[str] | None = None,
    labels: Labels = "required",
) -> Clips:
    """Check arrays, and make clips of them.

    Args:
        arrays: The arrays, of any kind.
        meta: Names of modalities, encoders and classes.
        modalities: The modalities to read; None: all.
        labels: As in `load_clips`.

    Raises:
        DataError: An array cannot be read, is missing or malformed.
    """
    return _Reader(arrays, meta, labels).clips(modalities)


@dataclass(frozen=True)
class Meta:
    """The content of meta.json.

    Attributes:
        version: Version of the format.
        modalities: Names of the modalities, in order; empty: all arrays that may be one.
        encoders: Name -> name of the encoder of the features.
        class_names: Names of the classes.
        seconds: Length of a clip of media files; None: not known.
    """

    version: int = VERSION
    modalities: tuple[str, ...] = ()
    encoders: dict[str, str] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    seconds: float | None = None


def read_meta(folder: Path) -> Meta:
    """Read meta.json; the defaults if there is none.

    Raises:
        DataError: The file is damaged, or of a newer version.
    """
    path = folder / META
    if not path.is_file():
        return Meta()
    try:
        if path.stat().st_size > _LARGEST_META:
            raise ValueError(f"more than {_LARGEST_META} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
        version, names = found.get("version", VERSION), found.get("modalities") or []
        encoders, classes = found.get("encoders") or {}, found.get("class_names") or []
        seconds = found.get("seconds")
        seconds = None if seconds is None else float(seconds)
        texts = [*names, *encoders, *encoders.values(), *classes]
        lists = isinstance(names, list) and isinstance(classes, list)
        if not (type(version) is int and lists and all(isinstance(x, str) for x in texts)):
            raise TypeError("a value has another type")
        odd = seconds is not None and not 0 < seconds < math.inf
        if (
            odd
            or version < 1
            or len(classes) > MOST_CLASSES
            or not all(map(str.isprintable, texts))
        ):
            raise ValueError("a value is out of range")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        rule = "must be a JSON object of version, modalities, encoders, class_names and seconds"
        raise DataError(f"{path}: {rule} ({error}).") from error
    if version > VERSION:
        rule = f"is of version {version}; this release reads up to {VERSION}"
        raise DataError(f"{path}: {rule}. Hint: update mmvq.")
    return Meta(version, tuple(names), dict(encoders), tuple(classes), seconds)


class _Reader:
    """Reads the arrays of a data set and checks each."""

    def __init__(self, arrays: Arrays, meta: Meta, labels: Labels) -> None:
        self.arrays, self.meta, self.path, self.labels = arrays, meta, arrays.path, labels

    def clips(self, modalities: Sequence[str] | None) -> Clips:
        """All clips in these modalities; None: in all."""
        names = self.names(modalities)
        split = self.split(names)
        N = len(split)
        headers = {name: self.feature_header(name, N) for name in names}
        T = headers[names[0]].shape[1]
        for name, header in headers.items():
            if header.shape[1] != T:
                rule = f"must have T = {T} segments, as {names[0]} has"
                raise self.error(name, rule, header)
        masks = {name: mask for name in names if (mask := self.mask(name, split, T)) is not None}
        features = {name: self.features(name, masks.get(name)) for name in names}

        labels, segment_labels = np.full(N, -1), dict[str, Array]()
        if labelled := bool(split.any()):
            labels = self.classes("labels", split, (N,), lowest=0)
            for name in names:
                if (key := SEGMENTS + name) in self.arrays.names:
                    segment_labels[name] = self.classes(key, split, (N, T), lowest=BACKGROUND)
        box = None
        if labelled and "video_box" in self.arrays.names:
            box = torch.from_numpy(self.integers("video_box", (N, T, 4)).astype(np.int64))
        num_classes = 1 + max(int(x.max()) for x in (labels, *segment_labels.values()))
        if self.meta.class_names and num_classes > len(self.meta.class_names):
            raise DataError(
                f"{self.path / META}: class_names has {len(self.meta.class_names)} names; "
                f"the labels go up to {num_classes - 1}."
            )
        clips = Clips(
            features=features,
            labels=torch.from_numpy(labels),
            segment_labels={name: torch.from_numpy(x) for name, x in segment_labels.items()},
            split=torch.from_numpy(split),
            video_box=box,
            num_classes=max(num_classes, len(self.meta.class_names)),
            masks=masks,
            ids=self.ids(N),
            class_names=self.meta.class_names,
            encoders={m: x for m, x in self.meta.encoders.items() if m in features},
            seconds=self.meta.seconds,
            folder=self.path if self.path.is_dir() else None,
            unused=self.unused(names),
        )
        if self.labels != "ignored":
            self.check_present(clips)
        return clips

    def split(self, names: Sequence[str]) -> Array:
        """The split of each clip; 0 where nothing is labelled, or labels are ignored."""
        arrays = self.arrays.names
        described = any(x in ("labels", "split") or x.startswith(SEGMENTS) for x in arrays)
        if self.labels == "ignored" or (self.labels == "optional" and not described):
            return np.zeros(self.feature_header(names[0]).shape[0], np.int64)
        split = self.read("split")
        if split.ndim != 1 or split.dtype.kind not in "iu":
            raise self.error("split", "must be int [N]", split)
        odd = split[(split < 0) | (split > VALIDATION)]
        if odd.size:
            raise self.error("split", "must hold only 0, 1, 2 and 3", f"{odd[0]}")
        nothing = self.labels == "optional" and split.size > 0 and not split.any()
        for use, number in SPLITS.items():
            if number != VALIDATION and not nothing and not (split == number).any():
                raise self.error("split", f"must have clips of split {number} ({use})", "none")
        return split.astype(np.int64)

    def names(self, modalities: Sequence[str] | None) -> tuple[str, ...]:
        """The modalities to read, checked as names."""
        if modalities is None:
            names = self.meta.modalities or self.expected()
        else:
            names = tuple(modalities)
        if not names:
            raise DataError(f"{self.path}: has no modality: no float array [N, T, ..., C].")
        if len(set(names)) < len(names):
            raise DataError(f"modalities: each name once; got {' '.join(names)}.")
        for name in names:
            odd = not name.isprintable() or any(c in name for c in "./\\")
            if not name or odd or hasattr(nn.ModuleDict(), name):
                rule = "cannot name a modality. Hint: rename the array"
                raise DataError(f"{self.path}: {name!r} {rule}.")
            if name not in self.arrays.names or self.reserved(name):
                offered = ", ".join(self.offered()) or "none"
                missing = f"no modality '{name}'"
                if modalities is None:
                    described = [x for x in (SEGMENTS, MASK) if x + name in self.arrays.names]
                    source = f"the file has {described[0]}{name}" if described else f"{META} has it"
                    missing += f", though {source}"
                raise DataError(f"{self.path}: {missing}. Modalities in the file: {offered}.")
        return names

    def feature_header(self, name: str, N: int | None = None) -> Header:
        header: Header = self.arrays.header(name)
        if header.dtype.hasobject:
            self.read(name)  # raises
        if header.dtype.kind != "f" or len(header.shape) < 3 or 0 in header.shape:
            raise self.error(name, "must be float [N, T, ..., C], none of them 0", header)
        if N is not None and header.shape[0] != N:
            first = "split" if "split" in self.arrays.names else "the first modality"
            raise self.error(name, f"must have N = {N} clips, as {first} has", header)
        return header

    def mask(self, name: str, split: Array, T: int) -> Tensor | None:
        """The mask of a modality; None if all is valid."""
        if (key := MASK + name) not in self.arrays.names:
            return None
        mask, shape = self.read(key), (len(split), T)
        if mask.dtype.kind != "b" or mask.shape != shape:
            raise self.error(key, f"must be bool {list(shape)}", mask)
        return None if mask.all() else torch.from_numpy(mask)

    def features(self, name: str, mask: Tensor | None) -> Rows:
        x: Rows = self.arrays.features(name)
        if isinstance(x, Tensor):
            x = only_valid(x, mask)
            check_finite(self.arrays.where(name), x)
        return x

    def ids(self, N: int) -> tuple[str, ...]:
        if "ids" not in self.arrays.names:
            return ()
        array = self.read("ids")
        if array.dtype.kind != "U" or array.shape != (N,):
            raise self.error("ids", f"must be text [{N}]", array)
        ids = tuple(map(str, array))
        if len(set(ids)) < N:
            raise self.error("ids", "must name each clip once", f"{N - len(set(ids))} repeated")
        return ids

    def check_present(self, clips: Clips) -> None:
        """Check that each modality with a mask has clips to train on and to test on."""
        for name in clips.masks:
            there = clips.valid(name).any(1)
            for use, number in SPLITS.items():
                rows = clips.split == number
                if rows.any() and not (rows & there).any():
                    rule = f"must have a valid segment in split {number} ({use})"
                    hint = "leave the modality out with --modalities"
                    raise self.error(MASK + name, rule, f"none. Hint: {hint}")
            shown = clips.labels_of(name)[clips.rows(TRAIN)]
            if clips.labelled and len(shown[shown >= 0].unique()) < 2:
                rule = "must be valid for two classes or more in split 1"
                raise self.error(MASK + name, rule, "one")

    def offered(self) -> tuple[str, ...]:
        """Names of the arrays that may be modalities."""
        return tuple(
            name
            for name in self.arrays.names
            if not self.reserved(name) and self.looks_like_features(name)
        )

    def looks_like_features(self, name: str) -> bool:
        """Whether an array is float with three dimensions or more."""
        try:
            header = self.arrays.header(name)
        except DataError:  # not an array
            return False
        return header.dtype.kind == "f" and len(header.shape) >= 3

    def expected(self) -> tuple[str, ...]:
        """Names of the arrays that may be modalities, or that have segment labels or a mask."""
        described = [
            name.removeprefix(prefix)
            for prefix in (SEGMENTS, MASK)
            for name in self.arrays.names
            if name.startswith(prefix)
        ]
        return tuple(dict.fromkeys((*self.offered(), *described)))

    def unused(self, names: Sequence[str]) -> dict[str, str]:
        """The arrays that are not used: name -> type and shape."""
        used = {*_RESERVED, *names, *(p + name for name in names for p in (SEGMENTS, MASK))}
        found: dict[str, str] = {}
        for name in self.arrays.names:
            if name not in used:
                try:
                    found[name] = str(self.arrays.header(name))
                except DataError:
                    found[name] = "(not an array)"
        return found

    @staticmethod
    def reserved(name: str) -> bool:
        return name in _RESERVED or name.startswith((SEGMENTS, MASK))

    def classes(self, name: str, split: Array, shape: tuple[int, ...], *, lowest: int) -> Array:
        """The labels of all splits but 0, checked; -1 in split 0, whose labels are ignored."""
        labelled = split != PRETRAIN
        known = self.integers(name, shape)[labelled]
        odd = known[(known < lowest) | (known >= MOST_CLASSES)]
        if odd.size:
            rule = f"must be {lowest} to {MOST_CLASSES - 1} outside split 0"
            raise self.error(name, rule, f"{odd[0]}. Hint: number the classes from 0")
        classes = np.full(shape, -1)
        classes[labelled] = known
        if len(shown := np.unique(classes[split == TRAIN])) < 2:
            raise self.error(name, "must have two classes or more in split 1", f"only {shown[0]}")
        return classes

    def integers(self, name: str, shape: tuple[int, ...]) -> Array:
        array = self.read(name)
        if array.dtype.kind not in "iu" or array.shape != shape:
            raise self.error(name, f"must be int {list(shape)}", array)
        return array

    def read(self, name: str) -> Array:
        if name not in self.arrays.names:
            found = ", ".join(self.arrays.names) or "nothing"
            raise DataError(f"{self.path}: array '{name}' is missing. Arrays: {found}.")
        array: Array = self.arrays.read(name)
        return array

    def error(self, name: str, rule: str, got: Array | Header | str) -> DataError:
        if isinstance(got, np.ndarray):
            got = Header(got.dtype, got.shape)
        return DataError(f"{self.arrays.where(name)}: {rule}; got {got}.")
