"""Encode all clips of a folder of media files, and write them as a data set.

Worker processes decode, and this process encodes, a batch of clips at a time. Each batch is written
to STORE.partial and then noted in a journal there, so that an extraction that was killed continues
after the last batch, with the same bytes. STORE appears when all clips are done. What is wrong with
a clip is a row of its problems.csv, and what it lacks is not valid in its masks.
"""

from __future__ import annotations

import csv
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..clips import PRETRAIN
from ..data import MASK, META, Meta
from ..errors import DataError
from ..files import (
    cache_folder,
    in_use,
    make_writable,
    require_new,
    temporary_folder,
    write_atomic,
)
from .decode import Cut, Decoded, decode, require_av
from .encoders import MODALITIES, Encoder, default_encoder, load_encoder
from .folder import MediaFolder, Source

BATCH = 16  # clips
PROBLEMS = "problems.csv"
_JOURNAL, _MANIFEST = "journal.jsonl", "manifest.json"
_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Settings:
    """How clips become features.

    Attributes:
        segments: Number of segments T.
        seconds: Length of a clip; of longer files, the first seconds are used.
        encoders: Modality -> name of its encoder, see `encoders`. Modalities that are not named are
            left out.
    """

    segments: int = 10
    seconds: float = 10.0
    encoders: Mapping[str, str] = field(
        default_factory=lambda: {name: default_encoder(name) for name in MODALITIES}
    )


class Report(NamedTuple):
    """What an extraction did.

    Attributes:
        clips: Number of clips.
        valid: Modality -> share of its segments that are valid. Those without any are left out of
            the data set.
        problems: (id, modality, what is wrong).
        seconds: Stage -> seconds that this run spent in it. Decoding is the sum over the workers;
            the modalities are encoded side by side.
    """

    clips: int
    valid: dict[str, float]
    problems: list[tuple[str, str, str]]
    seconds: dict[str, float]

    def __str__(self) -> str:
        shares = ", ".join(f"{name} in {x:.1%} of segments" for name, x in self.valid.items())
        stages = ", ".join(f"{name} {x:.0f} s" for name, x in self.seconds.items())
        lines = [f"{self.clips} clips: {shares}", f"time: {stages}"]
        if self.problems:
            kinds = Counter((modality, _kind(text)) for _, modality, text in self.problems)
            lines.append(f"problems of {len({x[0] for x in self.problems})} clips, see {PROBLEMS}:")
            lines += [f"  {n:5d}  {m}: {text}".rstrip() for (m, text), n in kinds.most_common(8)]
        return "\n".join(lines)


def extract(
    folder: MediaFolder,
    output: str | Path,
    settings: Settings,
    *,
    workers: int | None = None,
    device: torch.device | str = "cpu",
    resume: bool = False,
) -> Report:
    """Write the features of all clips as a data set.

    Args:
        folder: The clips.
        output: Folder of the data set, new or empty.
        settings: Segments and encoders.
        workers: Processes that decode; None: one for each core, at most 8; 0: this process.
        device: Where to encode.
        resume: Whether to continue an extraction that was interrupted.

    Raises:
        DataError: `output` is not empty, was begun with other files or settings, or cannot be
            written; an encoder cannot be loaded; no clip has anything to encode.
        ImportError: A package is not installed.
    """
    require_av()
    output = require_new(output)
    names = _possible(folder, settings)
    encoders = {name: load_encoder(name, settings.encoders[name], device) for name in names}
    partial = output.with_name(f"{output.name}.partial")
    with ExitStack() as held:
        store = _Partial(partial, folder, settings, encoders, resume)
        held.enter_context(in_use(partial))
        spent = _fill(store, folder.sources, encoders, settings, workers)
        report = store.finish(folder, settings, spent)
        if output.is_dir():
            output.rmdir()  # it is empty
        partial.rename(output)
    return report


@contextmanager
def temporary_store(
    folder: MediaFolder, settings: Settings, device: torch.device | str = "cpu"
) -> Iterator[tuple[Path, Report]]:
    """The data set of `extract` and its report; it is removed at the end.

    Raises:
        DataError: As in `extract`.
        ImportError: A package is not installed.
    """
    path, remove = temporary_folder(cache_folder(), "media")
    try:
        yield path / "store", extract(folder, path / "store", settings, device=device)
    finally:
        remove()


def _possible(folder: MediaFolder, settings: Settings) -> list[str]:
    """The modalities for which a clip has a file."""
    files = {
        "audio": any(x.sound for x in folder.sources),
        "video": any(x.picture for x in folder.sources),
        "text": any(x.captions for x in folder.sources),
    }
    if not (names := [name for name in MODALITIES if name in settings.encoders and files[name]]):
        wanted = " ".join(settings.encoders)
        raise DataError(f"{folder.path}: no clip has a file for {wanted}.")
    return names


def _fill(
    store: _Partial,
    sources: Sequence[Source],
    encoders: Mapping[str, Encoder],
    settings: Settings,
    workers: int | None,
) -> dict[str, float]:
    """Encode the batches that are not done; return the seconds of each stage."""
    first = store.batches * BATCH
    spent = dict.fromkeys(["decoding", *encoders], 0.0)
    cut = _cut(encoders, settings)
    bar = tqdm(desc="encoding", total=len(sources), initial=first, unit="clip", disable=None)
    with bar, ThreadPoolExecutor() as pool:
        for batch in _decoded(sources[first:], cut, workers):
            spent["decoding"] += sum(clip.seconds for clip in batch)
            features, valid, notes = _encode([x.clip for x in batch], encoders, pool, spent)
            problems = [
                (item.id, *note) for item, found in zip(batch, notes, strict=True) for note in found
            ]
            store.add(features, valid, problems)
            bar.update(len(batch))
    return spent


def _cut(encoders: Mapping[str, Encoder], settings: Settings) -> Cut:
    video, audio = encoders.get("video"), encoders.get("audio")
    return Cut(
        settings.segments,
        settings.seconds,
        frames=video.frames if video else 0,
        size=video.size if video else 0,
        rate=audio.rate if audio else 0,
        captions="text" in encoders,
    )


class _Item(NamedTuple):
    """A decoded clip and the seconds it took."""

    id: str
    clip: Decoded
    seconds: float


class _Sources(Dataset[_Item]):
    """Decodes the clip that it is indexed with."""

    def __init__(self, sources: Sequence[Source], cut: Cut) -> None:
        self.sources, self.cut = sources, cut

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, k: int) -> _Item:
        begun = time.perf_counter()
        clip = decode(self.sources[k], self.cut)
        return _Item(self.sources[k].id, clip, time.perf_counter() - begun)


def _decoded(sources: Sequence[Source], cut: Cut, workers: int | None) -> Iterator[list[_Item]]:
    """Decoded clips in batches, in order.

    Raises:
        DataError: A worker has died.
    """
    if workers is None:
        workers = min(os.cpu_count() or 1, 8)
    if len(sources) < 2:
        workers = 0
    loader = DataLoader(
        _Sources(sources, cut),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        collate_fn=_as_it_is,
        generator=torch.Generator(),
    )
    batch: list[_Item] = []
    done = 0
    try:
        for item in loader:
            batch.append(item)
            if len(batch) == BATCH:
                yield batch
                done, batch = done + len(batch), []
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error):
            raise
        near = ", ".join(x.id for x in sources[done + len(batch) :][: 4 * workers])
        rule = f"a process that decodes has died, on one of {near:.300}"
        hint = "remove that file, or decode with --workers 0 to see which, and use --resume"
        raise DataError(f"{rule}. Hint: {hint}.") from error
    if batch:
        yield batch


def _as_it_is(item: _Item) -> _Item:
    return item


def _encode(
    clips: Sequence[Decoded],
    encoders: Mapping[str, Encoder],
    pool: ThreadPoolExecutor,
    spent: dict[str, float],
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[list[tuple[str, str]]]]:
    """Features [n, T, C] in float16, validity [n, T], and notes of n clips."""
    features, validity, notes = {}, {}, [[*clip.notes] for clip in clips]

    def work(name: str) -> tuple[str, Tensor, Tensor, float]:
        begun = time.perf_counter()
        valid = torch.from_numpy(np.stack([clip.valid[name] for clip in clips]))
        with torch.inference_mode():
            x = _encoded(name, clips, encoders[name], valid)
        return name, x, valid, time.perf_counter() - begun

    for name, x, valid, seconds in pool.map(work, encoders):  # the modalities side by side
        fits = (x.abs() <= _LARGEST).all(-1)
        for k in (valid & ~fits).any(1).nonzero().flatten().tolist():
            notes[k].append((name, "the encoder gave NaN, Inf or numbers too large for float16"))
        validity[name] = valid & fits
        features[name] = torch.where(validity[name][..., None], x, 0).half()
        spent[name] += seconds
    return features, validity, notes


def _encoded(name: str, clips: Sequence[Decoded], encoder: Encoder, valid: Tensor) -> Tensor:
    """Features [n, T, C] in float32; zeros where not valid [n, T], or arbitrary."""
    x = torch.zeros(*valid.shape, encoder.width)
    if not valid.any():
        return x
    if name == "video":
        shown = [clip.frames[clip.valid[name]] for clip in clips]
        x[valid] = encoder(torch.from_numpy(np.concatenate(shown)))
    elif name == "audio":
        heard = [clip.sound for clip in clips if clip.valid[name].any()]
        x[valid.any(1)] = encoder(torch.from_numpy(np.stack(heard)))
    else:
        lines = [line for clip in clips for line in clip.captions if line]
        different = {line: k for k, line in enumerate(dict.fromkeys(lines))}
        x[valid] = encoder([*different])[torch.tensor([different[line] for line in lines])]
    return x


class _Partial:
    """A data set that is being written.

    Args:
        path: Its folder.
        folder: The clips.
        settings: Segments and encoders.
        encoders: The loaded encoders.
        resume: Whether it may exist.

    Attributes:
        batches: Number of batches that are written.
        problems: Of these: id, modality, text.
    """

    def __init__(
        self,
        path: Path,
        folder: MediaFolder,
        settings: Settings,
        encoders: Mapping[str, Encoder],
        resume: bool,
    ) -> None:
        self.path, self.batches, self.rows = path, 0, 0
        self.problems: list[tuple[str, str, str]] = []
        manifest = _manifest(folder, settings, encoders)
        if path.exists():
            self._continue(manifest, resume)
        else:
            self._create(manifest, len(folder.sources), settings.segments, encoders)
        names = [*encoders, *(MASK + name for name in encoders)]
        self.arrays = {
            name: np.lib.format.open_memmap(path / f"{name}.npy", mode="r+") for name in names
        }

    def _create(self, manifest: Any, N: int, T: int, encoders: Mapping[str, Encoder]) -> None:
        make_writable(self.path)
        for name, encoder in encoders.items():
            for key, kind, shape in (
                (name, "<f2", (N, T, encoder.width)),
                (MASK + name, "?", (N, T)),
            ):
                np.lib.format.open_memmap(self.path / f"{key}.npy", "w+", np.dtype(kind), shape)
        write_atomic(self.path / _MANIFEST, json.dumps(manifest).encode())

    def _continue(self, manifest: Any, resume: bool) -> None:
        where = f"{self.path}: holds an extraction that was interrupted"
        if not resume:
            raise DataError(f"{where}. Hint: --resume to continue it, or remove it.")
        try:
            found = json.loads((self.path / _MANIFEST).read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{where} before it began ({error}). Hint: remove it.") from error
        wanted = json.loads(json.dumps(manifest))
        if different := [key for key in wanted if found.get(key) != wanted[key]]:
            rule = f"with other {' and '.join(different)}"
            raise DataError(f"{where}, {rule}. Hint: the same command, or remove it.")
        journal = self.path / _JOURNAL
        whole = 0
        for line in journal.read_bytes().splitlines(keepends=True) if journal.exists() else ():
            if not line.endswith(b"\n"):  # killed while it was written
                break
            self.batches, whole = self.batches + 1, whole + len(line)
            self.problems += map(tuple, json.loads(line))
        if journal.exists():
            os.truncate(journal, whole)
        self.rows = min(self.batches * BATCH, len(wanted["files"]))

    def add(
        self,
        features: Mapping[str, Tensor],
        valid: Mapping[str, Tensor],
        problems: list[tuple[str, str, str]],
    ) -> None:
        """Write a batch, and then that it is written."""
        try:
            n = len(next(iter(features.values())))
            for name, x in features.items():
                for key, values in ((name, x), (MASK + name, valid[name])):
                    self.arrays[key][self.rows : self.rows + n] = values.numpy()
                    self.arrays[key].flush()
            with (self.path / _JOURNAL).open("ab") as journal:
                journal.write(json.dumps(problems).encode() + b"\n")
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error}).") from error
        self.rows, self.batches = self.rows + n, self.batches + 1
        self.problems += problems

    def finish(self, folder: MediaFolder, settings: Settings, seconds: dict[str, float]) -> Report:
        """Write labels and descriptions, and remove what was for this extraction only."""
        names = [name for name in self.arrays if MASK + name in self.arrays]
        share = {name: float(self.arrays[MASK + name].mean()) for name in names}
        self.arrays.clear()
        problems = [(name, "", text) for name, text in folder.notes] + self.problems
        kept = [name for name in names if share[name] > 0]
        if not kept:
            text = ", ".join(f"{x[0]}: {x[2]}" for x in problems[:3])
            raise DataError(f"{folder.path}: nothing could be decoded ({text}).")
        for name in names:
            if name not in kept:
                for key in (name, MASK + name):
                    (self.path / f"{key}.npy").unlink()
        classes = {name: k for k, name in enumerate(folder.class_names)}
        labels = [classes.get(x.label, -1) if x.split != PRETRAIN else -1 for x in folder.sources]
        np.save(self.path / "labels.npy", np.array(labels, np.int64))
        np.save(self.path / "split.npy", np.array([x.split for x in folder.sources], np.int8))
        np.save(self.path / "ids.npy", np.array([x.id for x in folder.sources]))
        encoders = {name: settings.encoders[name] for name in kept}
        meta = Meta(
            modalities=tuple(kept),
            encoders=encoders,
            class_names=folder.class_names,
            seconds=settings.seconds,
        )
        (self.path / META).write_text(json.dumps(asdict(meta), indent=2) + "\n", encoding="utf-8")
        with (self.path / PROBLEMS).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("id", "modality", "problem"), *problems])
        for name in (_JOURNAL, _MANIFEST):
            (self.path / name).unlink()
        return Report(len(folder.sources), share, problems, seconds)


def _manifest(
    folder: MediaFolder, settings: Settings, encoders: Mapping[str, Encoder]
) -> dict[str, Any]:
    """What an extraction depends on."""

    def state(path: Path | None) -> list[object] | None:
        if path is None:
            return None
        found = path.stat()
        return [str(path.relative_to(folder.path)), found.st_size, found.st_mtime_ns]

    return {
        "files": [[x.id, *map(state, (x.picture, x.sound, x.captions))] for x in folder.sources],
        "segments": settings.segments,
        "seconds": settings.seconds,
        "encoders": {name: [settings.encoders[name], x.width] for name, x in encoders.items()},
    }


def _kind(text: str) -> str:
    """A problem without what differs between clips."""
    return re.sub(r"\d+", "#", text.partition(" (")[0])
