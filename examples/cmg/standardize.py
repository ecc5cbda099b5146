"""Standardise features and reduce their dimension, once, before training.

Mean and standard deviation of the channels, and the principal axes of the standardised channels,
are measured on splits 0 and 1. Every vector x of C channels becomes its leading principal
components, of which large ones are whitened and small ones (noise) stay small:

    y = V^T ((x - mean) / deviation) / sqrt(eigenvalue + shrink)        [width]

In a grid [N, T, 7, 7, C] every cell is such a vector. Training uses only the reduced features.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from .data import PRETRAIN, TRAIN, Clips

_CLIPS_AT_ONCE = 32
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
        rows = clips.rows(PRETRAIN, TRAIN)
        mean: dict[str, Tensor] = {}
        axes: dict[str, Tensor] = {}
        for name, features in clips.features.items():
            x = _sample(features, rows, samples)  # [n, C]
            deviation, mean[name] = torch.std_mean(x, dim=0, correction=0)
            deviation[deviation <= _CONSTANT * mean[name].abs()] = torch.inf  # drops the channel
            x = (x - mean[name]) / deviation
            values, vectors = _principal_axes(x, width)
            axes[name] = vectors / deviation[:, None] / (values + shrink).sqrt()
        return cls(mean, axes)

    def transform(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map [N, T, ..., C], any float dtype, to float32 [N, T, ..., width], clip by clip."""
        reduced: dict[str, Tensor] = {}
        for name, x in features.items():
            mean, axes = self.mean[name], self.axes[name]
            reduced[name] = y = torch.empty(*x.shape[:-1], axes.shape[1])
            for part, out in zip(x.split(_CLIPS_AT_ONCE), y.split(_CLIPS_AT_ONCE), strict=True):
                torch.matmul(part.float() - mean, axes, out=out)
        return reduced

    def cells(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map to [N, T, P, width], P the number of cells of a grid, 1 for a vector."""
        return {
            name: rearrange(x, "n t ... c -> n t (...) c")
            for name, x in self.transform(features).items()
        }

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
        return cls(**parts)


def _principal_axes(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvalues and eigenvectors of x^T x / n for x [n, C]: [width], [C, width].

    Above `_WIDE` channels, random projections (Halko et al. 2011) with a fixed seed.
    """
    if x.shape[1] <= _WIDE:
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))  # ascending
        return values.flip(0)[:width].clamp(min=0), vectors.flip(1)[:, :width]
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        _, lengths, vectors = torch.svd_lowrank(x, q=min(width + 32, *x.shape), niter=4)
    return lengths[:width].square() / len(x), vectors[:, :width]


def _sample(features: Tensor, rows: Tensor, samples: int) -> Tensor:
    """Draw at most `samples` vectors of the clips `rows`, float32 [n, C]."""
    vectors = rearrange(features, "... c -> (...) c")  # [N * per_clip, C]
    per_clip = len(vectors) // len(features)
    total = len(rows) * per_clip
    generator = torch.Generator().manual_seed(0)
    if total <= samples:
        chosen = torch.arange(total)
    else:
        chosen = torch.randint(total, (samples,), generator=generator)
    return vectors[rows[chosen // per_clip] * per_clip + chosen % per_clip].float()
