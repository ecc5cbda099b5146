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
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..containers import Array
from ..data import MASK, META, Meta
from ..errors import DataError
from ..files import write_atomic

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
        self.path, self.written, self.modalities = path, 0, tuple(widths)
        self.problems: list[Problem] = []
        shapes = {name: (clips, segments, width) for name, width in widths.items()}
        try:
            if any(path.iterdir()):
                self._continue(json.loads(json.dumps(manifest)), resume)
            else:
                for name, shape in shapes.items():
                    self._open(name, "w+", np.dtype("<f2"), shape)
                    self._open(MASK + name, "w+", np.dtype(bool), shape[:2])
                write_atomic(path / _MANIFEST, json.dumps(manifest).encode())
            self.features = {name: self._open(name) for name in shapes}
            self.masks = {name: self._open(MASK + name) for name in shapes}
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error}).") from error

    def _open(self, name: str, mode: str = "r+", *kind: Any) -> Array:
        return np.lib.format.open_memmap(self.path / f"{name}.npy", mode, *kind)

    def _continue(self, manifest: dict[str, Any], resume: bool) -> None:
        where = f"{self.path}: holds an extraction that was interrupted"
        if not resume:
            raise DataError(f"{where}. Hint: --resume to continue it, or remove it.")
        try:
            found = json.loads((self.path / _MANIFEST).read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{where} before it began ({error}). Hint: remove it.") from error
        if different := [key for key, value in manifest.items() if found.get(key) != value]:
            rule = f"with other {' and '.join(different)}"
            raise DataError(f"{where}, {rule}. Hint: the same command, or remove it.")
        journal, whole = self.path / _JOURNAL, 0
        for line in journal.read_bytes().splitlines(keepends=True) if journal.exists() else ():
            if not line.endswith(b"\n"):  # killed while it was written
                break
            clips, problems = json.loads(line)
            self.written, whole = self.written + clips, whole + len(line)
            self.problems += map(tuple, problems)
        if journal.exists():
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
                here = slice(self.written, self.written + len(x))
                self.features[name][here] = x.numpy()
                self.masks[name][here] = masks[name].numpy()
                self.features[name].flush()
                self.masks[name].flush()
            with (self.path / _JOURNAL).open("ab") as journal:
                journal.write(json.dumps([len(x), [*problems]]).encode() + b"\n")
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error}).") from error
        self.written += len(x)
        self.problems += problems

    def finish(
        self, arrays: Mapping[str, Array], meta: Meta, notes: Iterable[Problem]
    ) -> dict[str, float]:
        """Write what describes the clips, and remove what was for the writing only.

        Args:
            arrays: Labels, splits and ids.
            meta: The content of meta.json; modalities without a valid segment are left out.
            notes: Problems that no batch had.

        Returns:
            Modality -> share of its segments that are valid.

        Raises:
            DataError: Nothing is valid, or the folder cannot be written to.
        """
        share = {name: float(mask.mean()) for name, mask in self.masks.items()}
        self.features.clear()
        self.masks.clear()
        self.problems = [*notes, *self.problems]
        if not (kept := tuple(name for name, x in share.items() if x > 0)):
            text = ", ".join(f"{x[0]}: {x[2]}" for x in self.problems[:3])
            raise DataError(f"nothing could be decoded ({text}).")
        encoders = {name: meta.encoders[name] for name in kept}
        meta = replace(meta, modalities=kept, encoders=encoders)
        try:
            for name in share.keys() - {*kept}:
                for key in (name, MASK + name):
                    (self.path / f"{key}.npy").unlink()
            for name, array in arrays.items():
                np.save(self.path / f"{name}.npy", array, allow_pickle=False)
            (self.path / META).write_text(json.dumps(asdict(meta), indent=2) + "\n", "utf-8")
            with (self.path / PROBLEMS).open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("id", "modality", "problem"), *self.problems])
            for name in (_JOURNAL, _MANIFEST):
                (self.path / name).unlink()
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error}).") from error
        return share
