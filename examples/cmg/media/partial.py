"""A data set that is being written, and continued if that was interrupted.

The arrays have their final size from the beginning. After each batch a line is added to a journal;
what comes after its last whole line is written again.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..containers import Array
from ..data import MASK, META, Meta
from ..errors import DataError
from ..files import give_name, write_atomic

Problem = tuple[str, str, str]  # id, modality, what is wrong
PROBLEMS = "problems.csv"
_JOURNAL, _MANIFEST = "journal.jsonl", "manifest.json"


class PartialStore:
    """Features and masks of N clips, of which the first are written.

    Args:
        path: The folder. It exists and is held by this process, see `files.in_use`.
        widths: Modality -> number of channels C.
        clips: Number of clips N.
        segments: Number of segments T.
        manifest: All that the features depend on, for JSON.
        resume: Whether to continue what is there.

    Attributes:
        written: Number of clips that are written.
        problems: Their problems.

    Raises:
        DataError: The folder is not empty, and not to be continued or with another manifest; or it
            cannot be written to.
    """

    def __init__(
        self,
        path: Path,
        widths: Mapping[str, int],
        clips: int,
        segments: int,
        manifest: Mapping[str, Any],
        resume: bool,
    ) -> None:
        self.path, self.written, self.clips = path, 0, clips
        self.modalities = tuple(widths)
        self.problems: list[Problem] = []
        kinds = {name: ("<f2", (clips, segments, width)) for name, width in widths.items()}
        kinds |= {MASK + name: ("|b1", (clips, segments)) for name in widths}
        try:
            if any(path.iterdir()):
                self._continue(json.loads(json.dumps(manifest)), resume, kinds)
            else:
                for name, (kind, shape) in kinds.items():
                    self._create(name, kind, shape)
                (path / _JOURNAL).touch()
                write_atomic(path / _MANIFEST, json.dumps(manifest).encode())
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error}).") from error

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.npy"

    def _create(self, name: str, kind: str, shape: tuple[int, ...]) -> None:
        """Write an array of zeros, which takes no room on the disk yet."""
        header: Any = {"descr": kind, "fortran_order": False, "shape": shape}
        with self._file(name).open("xb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + np.dtype(kind).itemsize * prod(shape))

    def _put(self, name: str, rows: Array) -> None:
        """Write the rows of the next clips."""
        with self._file(name).open("r+b") as file:  # a map would end the process on a full disk
            file.seek(self.written * rows[0].nbytes - self.clips * rows[0].nbytes, os.SEEK_END)
            file.write(rows.tobytes())

    def _continue(
        self, manifest: dict[str, Any], resume: bool, kinds: Mapping[str, tuple[str, Any]]
    ) -> None:
        where = f"{self.path}: holds an extraction that was interrupted"
        if not resume:
            raise DataError(f"{where}. Hint: --resume to continue it, or remove it.")
        try:
            found = dict(json.loads((self.path / _MANIFEST).read_bytes()))
            different = [key for key, value in manifest.items() if found.get(key) != value]
            if not different:
                self._check(kinds)
                self._read_journal()
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{where}, and is damaged ({error}). Hint: remove it.") from error
        if different:
            rule = f"with other {' and '.join(different)}"
            raise DataError(f"{where}, {rule}. Hint: the same command, or remove it.")

    def _check(self, kinds: Mapping[str, tuple[str, Any]]) -> None:
        for name, (kind, shape) in kinds.items():
            array = np.load(self._file(name), mmap_mode="r", allow_pickle=False)
            if (array.dtype.str, array.shape) != (kind, shape):
                raise ValueError(f"{name}.npy is not {kind}{list(shape)}")

    def _read_journal(self) -> None:
        journal, whole = self.path / _JOURNAL, 0
        for line in journal.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):  # killed while it was written
                break
            clips, problems = json.loads(line)
            self.written, whole = self.written + clips, whole + len(line)
            self.problems += [(str(x), str(y), str(z)) for x, y, z in problems]
        if not 0 <= self.written <= self.clips:
            raise ValueError(f"{_JOURNAL} has {self.written} clips")
        os.truncate(journal, whole)

    def add(
        self,
        features: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        problems: Iterable[Problem],
    ) -> None:
        """Write the next n clips, and then that they are written.

        Args:
            features: Modality -> float16 [n, T, C].
            masks: Modality -> bool [n, T].
            problems: What is wrong with these clips.
        """
        try:
            for name, x in features.items():
                self._put(name, x.numpy().astype("<f2", copy=False))
                self._put(MASK + name, masks[name].numpy())
            with (self.path / _JOURNAL).open("ab") as journal:
                journal.write(json.dumps([len(x), [*problems]]).encode() + b"\n")
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error}).") from error
        self.written += len(x)
        self.problems += problems

    def finish(
        self, output: Path, arrays: Mapping[str, Array], meta: Meta, notes: Iterable[Problem]
    ) -> dict[str, float]:
        """Write what describes the clips, and give the folder its name.

        Until then it can be continued.

        Args:
            output: The name; it does not exist, or is an empty folder.
            arrays: Labels, splits and ids.
            meta: The content of meta.json; modalities without a valid segment are left out.
            notes: Problems that no batch had.

        Returns:
            Modality -> share of its segments that are valid.

        Raises:
            DataError: Nothing is valid, or the folder cannot be written to.
        """
        masks = {name: np.load(self._file(MASK + name)) for name in self.modalities}
        share = {name: float(mask.mean()) for name, mask in masks.items()}
        self.problems = [*notes, *self.problems]
        if not (kept := tuple(name for name, x in share.items() if x > 0)):
            text = ", ".join(f"{x[0]}: {x[2]}" for x in self.problems[:3])
            raise DataError(f"nothing could be decoded ({text}).")
        encoders = {name: meta.encoders[name] for name in kept}
        meta = replace(meta, modalities=kept, encoders=encoders)
        try:
            for name, array in arrays.items():
                np.save(self._file(name), array, allow_pickle=False)
            (self.path / META).write_text(json.dumps(asdict(meta), indent=2) + "\n", "utf-8")
            with (self.path / PROBLEMS).open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("id", "modality", "problem"), *self.problems])
            give_name(self.path, output)
            left_out = [key for x in share.keys() - {*kept} for key in (x, MASK + x)]
            for name in (_JOURNAL, _MANIFEST, *(f"{key}.npy" for key in left_out)):
                (output / name).unlink()
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error}).") from error
        return share
