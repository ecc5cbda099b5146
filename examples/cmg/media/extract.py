"""Encode all clips of a folder of media files, and write them as a data set.

Worker processes decode, and this process encodes, a batch of clips at a time. Each batch is written
to STORE.partial and then noted in a journal there, so that an extraction that was killed continues
after the last batch, with the same bytes. STORE appears when all clips are done. What is wrong with
a clip is a row of its problems.csv, and what it lacks is not valid in its masks.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..clips import PRETRAIN
from ..containers import Array
from ..data import Meta
from ..errors import DataError
from ..files import cache_folder, free_name, in_use, make_writable, temporary_folder
from .decode import Cut, Decoded, require_av
from .encoders import MODALITIES, Encoder, default_encoder, load_encoder
from .folder import MediaFolder
from .loading import load
from .partial import PartialStore, Problem

BATCH = 16  # clips
_LONGEST, _MOST_SEGMENTS = 3600, 10_000
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
    problems: list[Problem]
    seconds: dict[str, float]

    def __str__(self) -> str:
        shares = ", ".join(f"{name} in {x:.1%} of segments" for name, x in self.valid.items())
        stages = ", ".join(f"{name} {x:.0f} s" for name, x in self.seconds.items())
        lines = [f"{self.clips} clips: {shares}", f"time: {stages}"]
        kinds = Counter((where, text.partition(":")[0]) for _, where, text in self.problems)
        # what is short or long is not wrong, and comes last
        order = sorted(kinds.items(), key=lambda x: ("than the clip" in x[0][1], -x[1]))
        lines += [f"  {n:5d}  {where}: {text}" for (where, text), n in order]
        if any(2 * n > self.clips for (_, text), n in order if text.startswith("shorter")):
            hint = "with fewer --seconds and --segments, less of them is masked"
            lines.append(f"Hint: more than half of the clips are shorter; {hint}.")
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
            written; an encoder cannot be loaded; no clip has anything to encode; a package is not
            installed.
    """
    if not (0 < settings.seconds <= _LONGEST and 0 < settings.segments <= _MOST_SEGMENTS):
        got = f"{settings.seconds:g} s in {settings.segments} segments"
        rule = f"a clip has at most {_LONGEST} s and {_MOST_SEGMENTS} segments"
        raise DataError(f"{rule}; got {got}.")
    require_av()
    output = free_name(output)
    names = _possible(folder, settings)
    encoders = {name: load_encoder(name, settings.encoders[name], device) for name in names}
    partial = output.with_name(f"{output.name}.partial")
    make_writable(partial)
    with in_use(partial):
        store = PartialStore(
            partial,
            {name: encoder.width for name, encoder in encoders.items()},
            len(folder.sources),
            settings.segments,
            _manifest(folder, settings, encoders),
            resume,
        )
        spent = _fill(store, folder, encoders, settings, workers)
        meta = Meta(
            encoders=dict(settings.encoders),
            class_names=folder.class_names,
            seconds=settings.seconds,
        )
        share = store.finish(output, _described(folder), meta, folder.notes)
    return Report(len(folder.sources), share, store.problems, spent)


@contextmanager
def temporary_store(
    folder: MediaFolder, settings: Settings, device: torch.device | str = "cpu"
) -> Iterator[tuple[Path, Report]]:
    """The data set of `extract` and its report; it is removed at the end.

    Raises:
        DataError: As in `extract`.
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
    store: PartialStore,
    folder: MediaFolder,
    encoders: Mapping[str, Encoder],
    settings: Settings,
    workers: int | None,
) -> dict[str, float]:
    """Encode the clips that are not written; return the seconds of each stage."""
    spent = dict.fromkeys(["decoding", *encoders], 0.0)
    N, left = len(folder.sources), folder.sources[store.written :]
    bar = tqdm(desc="encoding", total=N, initial=store.written, unit="clip", disable=None)
    with bar, ThreadPoolExecutor() as pool:
        for batch in load(left, _cut(encoders, settings), BATCH, workers):
            spent["decoding"] += sum(x.seconds for x in batch)
            features, masks, notes = _encode([x.clip for x in batch], encoders, pool, spent)
            problems = [(batch[k].id, *note) for k, found in enumerate(notes) for note in found]
            store.add(features, masks, problems)
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


def _described(folder: MediaFolder) -> dict[str, Array]:
    """Labels, splits and ids of the clips."""
    classes = {name: k for k, name in enumerate(folder.class_names)}
    labels = [classes.get(x.label, -1) if x.split != PRETRAIN else -1 for x in folder.sources]
    return {
        "labels": np.array(labels, np.int64),
        "split": np.array([x.split for x in folder.sources], np.int8),
        "ids": np.array([x.id for x in folder.sources]),
    }


def _manifest(
    folder: MediaFolder, settings: Settings, encoders: Mapping[str, Encoder]
) -> dict[str, Any]:
    """What the features depend on."""

    def state(path: Path | None) -> list[object] | None:
        if path is None:
            return None
        found = path.stat()
        return [os.path.relpath(path, folder.path), found.st_size, found.st_mtime_ns]

    return {
        "files": [[x.id, *map(state, (x.picture, x.sound, x.captions))] for x in folder.sources],
        "segments": settings.segments,
        "seconds": settings.seconds,
        "encoders": {name: [settings.encoders[name], x.width] for name, x in encoders.items()},
    }
