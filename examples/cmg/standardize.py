"""Features made small and even, once, before any training.

A channel's mean and deviation, and the principal axes of the standardised channels, are measured on
splits 0 and 1. Every vector x of C channels then becomes

    y = V^T ((x - mean) / deviation) / sqrt(eigenvalue + shrink)        [width]

the leading principal components, large ones whitened and small ones (noise) left small. Of a grid
[N, T, 7, 7, C] every cell is such a vector, so 512 channels become 128 and stay so: training
never touches the wide features again.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import PRETRAIN, TRAIN, Clips

_CLIPS_AT_ONCE = 32
_WIDE = 2048  # channels; beyond, an exact decomposition takes minutes and more
_CONSTANT = 1e-6  # of a channel's mean: a deviation up to this is float32's rounding


@dataclass(frozen=True)
class Standardizer:
    """An affine map per modality, y = (x - mean) @ axes.

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
            clips: The data.
            width: The most components to keep; never more than there are channels, or,
                of many channels, vectors.
            shrink: Added to each eigenvalue, in units of one standardised channel's variance.
            samples: The most vectors of a modality to measure on, drawn at random with a fixed
                seed. At most this many rows are held in float32 at once.
        """
        rows = clips.rows(PRETRAIN, TRAIN)
        mean: dict[str, Tensor] = {}
        axes: dict[str, Tensor] = {}
        for name, features in clips.features.items():
            x = _sample(features, rows, samples)  # [n, C]
            deviation, mean[name] = torch.std_mean(x, dim=0, correction=0)
            deviation[deviation <= _CONSTANT * mean[name].abs()] = torch.inf  # drop it
            x = (x - mean[name]) / deviation
            values, vectors = _principal_axes(x, width)
            axes[name] = vectors / deviation[:, None] / (values + shrink).sqrt()
        return cls(mean, axes)

    def transform(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map [N, T, ..., C], any float dtype, to float32 [N, T, ..., width], clip by clip."""
        return {name: self._transform(name, x) for name, x in features.items()}

    def cells(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same with the cells of a grid in a row, [N, T, P, width]; a flat vector is one."""
        return {
            name: x.reshape(*x.shape[:2], -1, x.shape[-1])
            for name, x in self.transform(features).items()
        }

    def _transform(self, name: str, x: Tensor) -> Tensor:
        mean, axes = self.mean[name], self.axes[name]
        y = torch.empty(*x.shape[:-1], axes.shape[1])
        for part, out in zip(x.split(_CLIPS_AT_ONCE), y.split(_CLIPS_AT_ONCE), strict=True):
            torch.matmul(part.float() - mean, axes, out=out)
        return y

    def denoise(self, name: str, x: Tensor) -> Tensor:
        """Centred float32 vectors [..., C] with nothing left outside the kept components."""
        axes = self.axes[name]
        return (x - self.mean[name]) @ axes @ torch.linalg.pinv(axes)

    def tensors(self) -> dict[str, Tensor]:
        """The map as flat names and tensors, to be stored with a model's."""
        mean = {f"standardizer/mean/{name}": x for name, x in self.mean.items()}
        return mean | {f"standardizer/axes/{name}": x for name, x in self.axes.items()}

    def fingerprint(self) -> int:
        """A checksum: other data, another map, another number."""
        return zlib.crc32(b"".join(x.numpy().tobytes() for x in self.tensors().values()))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Standardizer:
        """The map that `tensors()` described, other tensors aside."""
        parts: dict[str, dict[str, Tensor]] = {"mean": {}, "axes": {}}
        for key, x in tensors.items():
            match key.split("/", 2):
                case ["standardizer", part, name]:
                    parts[part][name] = x
        return cls(**parts)


def _principal_axes(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvalues and eigenvectors of x^T x / n for x [n, C]: [width], [C, width].

    Of more than `_WIDE` channels by random projections (Halko et al. 2011), always the same.
    """
    if x.shape[1] <= _WIDE:
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))  # ascending
        return values.flip(0)[:width].clamp(min=0), vectors.flip(1)[:, :width]
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        _, lengths, vectors = torch.svd_lowrank(x, q=min(width + 32, *x.shape), niter=4)
    return lengths[:width].square() / len(x), vectors[:, :width]


def _sample(features: Tensor, rows: Tensor, samples: int) -> Tensor:
    """At most `samples` vectors of the clips `rows`, float32 [n, C]."""
    vectors = features.flatten(0, -2)  # [N * per_clip, C]
    per_clip = len(vectors) // len(features)
    total = len(rows) * per_clip
    generator = torch.Generator().manual_seed(0)
    if total <= samples:
        chosen = torch.arange(total)
    else:
        chosen = torch.randint(total, (samples,), generator=generator)
    return vectors[rows[chosen // per_clip] * per_clip + chosen % per_clip].float()
