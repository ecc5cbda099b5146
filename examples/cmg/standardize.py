"""Standardise features and reduce their dimension, once, before training.

Mean and standard deviation of the channels, and the principal axes of the standardised channels,
are measured on splits 0 and 1. Every vector x of C channels becomes its leading principal
components, of which large ones are whitened and small ones (noise) stay small:

    y = V^T ((x - mean) / deviation) / sqrt(eigenvalue + shrink)        [width]

In a grid [N, T, 7, 7, C] every cell is such a vector. Training uses only the reduced features.
"""

from __future__ import annotations

import json
import math
import os
import weakref
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from einops import rearrange
from torch import Tensor

from .checkpoint import load_model, save_model
from .clips import PRETRAIN, TRAIN, Clips
from .containers import CLIPS_AT_ONCE, MappedArray, write_features
from .data import MASK
from .errors import DataError
from .files import alone, cache_folder, temporary_folder, write_atomic
from .ranks import is_first

_VERSION = 1  # of stored maps
_WIDE = 2048  # channels; with more, an exact decomposition takes minutes
_CONSTANT = 1e-6  # relative to the mean; a smaller deviation is rounding error of float32


@dataclass(frozen=True)
class Standardizer:
    """An affine map for each modality, y = (x - mean) @ axes.

    Attributes:
        mean: Name -> float32 [C].
        axes: Name -> float32 [C, width].
    """

    mean: dict[str, Tensor]
    axes: dict[str, Tensor]

    @classmethod
    def fit(
        cls, clips: Clips, *, width: int = 128, shrink: float = 5.0, samples: int = 20_000
    ) -> Standardizer:
        """Measure the map on splits 0 and 1 (labels are not used).

        Args:
            clips: Clips to measure the map on.
            width: Maximum number of components. There are never more than channels, or than
                vectors if there are many channels.
            shrink: Number added to each eigenvalue, in units of a standardised channel's variance.
            samples: Maximum number of vectors of a modality to measure on, drawn at random with a
                fixed seed. This limits memory.
        """
        mean: dict[str, Tensor] = {}
        axes: dict[str, Tensor] = {}
        for name in clips.modalities:
            x = _sample(clips, name, samples)  # [n, C]
            deviation, mean[name] = torch.std_mean(x, dim=0, correction=0)
            deviation[deviation <= _CONSTANT * mean[name].abs()] = torch.inf  # drops the channel
            x = (x - mean[name]) / deviation
            values, vectors = _principal_axes(x, width)
            axes[name] = _by_columns(vectors / deviation[:, None] / (values + shrink).sqrt())
        return cls(mean, axes)

    @classmethod
    def of(cls, clips: Clips) -> Standardizer:
        """The map of a data set: `fit`, but stored if the data set is a folder.

        It is measured again if a file that it depends on has changed. If several ranks measure it,
        all get the same; only rank 0 stores it.
        """
        if clips.folder is None:
            return cls.fit(clips)
        found = cls({}, {})
        for name in clips.modalities:
            folder, state = _store(clips.folder) / name, _state_of_files(clips.folder, name)
            one = _stored(folder, state)
            if one is None:
                one = cls.fit(clips.only([name]))
                if is_first():
                    save_model(folder, one.tensors(), state)
            found.mean.update(one.mean)
            found.axes.update(one.axes)
        return found

    def on_disk(self, clips: Clips) -> dict[str, MappedArray]:
        """Standardised features [N, T, ..., width] in float16 on disk, computed if they are not.

        They are stored with the map, once for all processes. Those of data that are not in a folder
        are in a temporary folder, which is removed with the result.
        """
        found: dict[str, MappedArray] = {}
        for name in clips.modalities:
            if clips.folder is None:
                folder, remove = temporary_folder(cache_folder(), "standardized")
                write_atomic(folder / f"{name}.npy", partial(self._write, clips, name))
                found[name] = MappedArray(folder / f"{name}.npy")
                weakref.finalize(found[name], remove)
                continue
            folder, state = _store(clips.folder) / name, _state_of_files(clips.folder, name)
            data = zlib.crc32(json.dumps(state).encode())
            own = zlib.crc32(self.mean[name].numpy().tobytes() + self.axes[name].numpy().tobytes())
            path = folder / f"features-{data:08x}-{own:08x}.npy"
            with alone(folder):
                if not path.is_file():
                    for old in folder.glob("features-*.npy"):
                        if f"-{data:08x}-" not in old.name:  # the data have changed since
                            old.unlink()
                    write_atomic(path, partial(self._write, clips, name))
            found[name] = MappedArray(path)
        return found

    def _write(self, clips: Clips, name: str, file: BinaryIO) -> None:
        shape = (*clips.features[name].shape[:-1], self.axes[name].shape[1])
        most = torch.finfo(torch.float16).max
        parts = (
            self.apply(name, clips.read(name, rows)).clamp(-most, most).half()
            for rows in torch.arange(shape[0]).split(CLIPS_AT_ONCE)
        )
        write_features(file, shape, parts, f"standardising {name}")

    def transform(self, clips: Clips) -> dict[str, Tensor]:
        """Map all clips to float32 [N, T, ..., width], a few at a time."""
        reduced: dict[str, Tensor] = {}
        for name, x in clips.features.items():
            reduced[name] = y = torch.empty(*x.shape[:-1], self.axes[name].shape[1])
            for rows in torch.arange(len(y)).split(CLIPS_AT_ONCE):
                self.apply(name, clips.read(name, rows), out=y[rows[0] : rows[-1] + 1])
        return reduced

    def apply(self, name: str, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Map vectors [..., C] of a modality, any float dtype, to float32 [..., width]."""
        return torch.matmul(x.float() - self.mean[name], self.axes[name], out=out)

    def denoise(self, name: str, x: Tensor) -> Tensor:
        """Centre float32 vectors [..., C] and project them onto the kept components and back."""
        axes = self.axes[name]
        return (x - self.mean[name]) @ axes @ torch.linalg.pinv(axes)

    def tensors(self) -> dict[str, Tensor]:
        """The map as a flat dict of tensors, to save with those of the model."""
        mean = {f"standardizer/mean/{name}": x for name, x in self.mean.items()}
        return mean | {f"standardizer/axes/{name}": x for name, x in self.axes.items()}

    def fingerprint(self) -> int:
        """A checksum that identifies the map, and so the data."""
        return zlib.crc32(b"".join(x.numpy().tobytes() for x in self.tensors().values()))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Standardizer:
        """The map from the dict that `tensors()` returned; other tensors are ignored."""
        parts: dict[str, dict[str, Tensor]] = {"mean": {}, "axes": {}}
        for key, x in tensors.items():
            match key.split("/", 2):
                case ["standardizer", part, name]:
                    parts[part][name] = x
        return cls(parts["mean"], {name: _by_columns(x) for name, x in parts["axes"].items()})


def _by_columns(x: Tensor) -> Tensor:
    """The same matrix, stored by columns: products round the same, measured or loaded."""
    return x.T.contiguous().T


def _principal_axes(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvalues and eigenvectors of x^T x / n for x [n, C]: [width], [C, width].

    Above `_WIDE` channels, random projections (Halko et al. 2011) with a fixed seed.
    """
    if x.shape[1] <= _WIDE:
        covariance = x.T @ x / len(x)
        try:
            values, vectors = torch.linalg.eigh(covariance)  # ascending
        except torch.linalg.LinAlgError:  # of few vectors with many zeros
            values, vectors = (v.float() for v in torch.linalg.eigh(covariance.double()))
        return values.flip(0)[:width].clamp(min=0), vectors.flip(1)[:, :width]
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        _, lengths, vectors = torch.svd_lowrank(x, q=min(width + 32, *x.shape), niter=4)
    return lengths[:width].square() / len(x), vectors[:, :width]


def _sample(clips: Clips, name: str, samples: int) -> Tensor:
    """Draw at most `samples` valid vectors of splits 0 and 1, float32 [n, C]."""
    rows, shape = clips.rows(PRETRAIN, TRAIN), clips.features[name].shape
    P = math.prod(shape[2:-1])  # cells of a segment
    clip, segment = clips.valid(name)[rows].nonzero(as_tuple=True)
    total = len(clip) * P
    generator = torch.Generator().manual_seed(0)
    if total <= samples:
        chosen = torch.arange(total)
    else:
        chosen = torch.randint(total, (samples,), generator=generator)
    clip, segment, cell = clip[chosen // P], segment[chosen // P], chosen % P
    needed, clip = clip.unique(return_inverse=True)
    vectors = torch.empty(len(chosen), shape[-1])
    for part in torch.arange(len(needed)).split(CLIPS_AT_ONCE):
        x = rearrange(clips.read(name, rows[needed[part]]), "n t ... c -> n t (...) c")
        here = ((clip >= part[0]) & (clip <= part[-1])).nonzero().squeeze(1)
        vectors[here] = x[clip[here] - part[0], segment[here], cell[here]].float()
    return vectors


def _store(folder: Path) -> Path:
    """Where to store what is measured on a data set: in it, or in the cache if it is read-only."""
    if os.access(folder, os.W_OK):
        return folder / "standardizer"
    return cache_folder() / f"standardizer-{zlib.crc32(str(folder.resolve()).encode()):08x}"


def _state_of_files(folder: Path, name: str) -> dict[str, object]:
    """Size and time of the files that the map of a modality depends on."""
    files = [folder / f"{x}.npy" for x in (name, MASK + name, "split")]
    files += sorted(folder.glob("*.arrow"))  # of Hugging Face datasets
    stats = {str(x.relative_to(folder)): x.stat() for x in files if x.exists()}
    return {"version": _VERSION} | {x: [s.st_size, s.st_mtime_ns] for x, s in stats.items()}


def _stored(folder: Path, state: Mapping[str, object]) -> Standardizer | None:
    """The map in a folder; None if there is none, or one of other files."""
    try:
        tensors, found = load_model(folder)
        return Standardizer.from_tensors(tensors) if found == state else None
    except (DataError, KeyError):  # missing, damaged, or another file of this name
        return None
