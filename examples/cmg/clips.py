"""Clips of several modalities, in splits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .containers import Rows
from .errors import DataError

PRETRAIN, TRAIN, TEST, VALIDATION = 0, 1, 2, 3
SPLITS = {"pre-train": 0, "downstream train": 1, "downstream test": 2, "validation": 3}
BACKGROUND = -1
MOST_CLASSES = 1 << 12  # heads have an output for each


@dataclass(frozen=True)
class Clips:
    """N clips of T segments in several modalities.

    Attributes:
        features: Name -> [N, T, ..., C], float32, or float16 where the file holds float16.
        labels: int64 [N], the class of each clip; -1 in split 0.
        segment_labels: Name -> int64 [N, T], -1 for background and in split 0; may be empty.
        split: int64 [N], one of PRETRAIN, TRAIN, TEST and VALIDATION.
        video_box: int64 [N, T, 4] or None.
        num_classes: Number of classes; labels are 0 to num_classes - 1.
        masks: Name -> bool [N, T], True = valid. A modality that is always valid has none.
        ids: Names of the clips; may be empty.
        class_names: Names of the classes; may be empty.
        encoders: Name -> name of the encoder of the features; may be empty.
        seconds: Length of a clip; None: not known.
        folder: Folder of the data set, in which what is measured on it can be stored; or None.
        unused: What else the data set holds: name -> type and shape.
    """

    features: Mapping[str, Rows]
    labels: Tensor
    segment_labels: dict[str, Tensor]
    split: Tensor
    video_box: Tensor | None
    num_classes: int
    masks: dict[str, Tensor] = field(default_factory=dict)
    ids: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    encoders: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None
    folder: Path | None = None
    unused: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, features: Mapping[str, Rows], masks: Mapping[str, Tensor] | None = None) -> Clips:
        """Clips without labels, all of split 0."""
        N = next(iter(features.values())).shape[0]
        none = torch.full((N,), -1)
        return cls(features, none, {}, torch.zeros(N).long(), None, 0, dict(masks or {}))

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names of the modalities, in order."""
        return tuple(self.features)

    @property
    def segments(self) -> int:
        """Number of segments T."""
        return next(iter(self.features.values())).shape[1]

    def rows(self, *splits: int) -> Tensor:
        """Indices of the clips in any of `splits`, ascending."""
        return torch.isin(self.split, torch.tensor(splits)).nonzero().squeeze(1)

    @property
    def labelled(self) -> bool:
        """Whether there are clips with labels, those of split 1."""
        return bool((self.split == TRAIN).any())

    def holding_out(self) -> Clips:
        """The same clips without labels, of which a tenth is in split 3, always the same one."""
        order = torch.randperm(len(self.split), generator=torch.Generator().manual_seed(0))
        split = self.split.clone()
        split[order[: max(1, len(order) // 10)]] = VALIDATION
        return replace(self, split=split)

    def test_rows(self) -> Tensor:
        """Indices of the clips that statistics are of: split 2, or without labels split 3."""
        return self.rows(TEST if self.labelled else VALIDATION)

    def validation_rows(self) -> Tensor:
        """Indices of the clips for choices: split 3, or split 1 if there is no split 3."""
        rows = self.rows(VALIDATION)
        return rows if len(rows) else self.rows(TRAIN)

    def valid(self, name: str, rows: Tensor | None = None) -> Tensor:
        """The mask of a modality, bool [n, T], of some clips; None: of all."""
        n = len(self.split) if rows is None else len(rows)
        if name not in self.masks:
            return torch.ones(n, self.segments, dtype=torch.bool)
        return self.masks[name] if rows is None else self.masks[name][rows]

    def read(self, name: str, rows: Tensor) -> Tensor:
        """Read clips of a modality, [n, T, ..., C], with zeros where they are not valid.

        Raises:
            DataError: A valid element is NaN or Inf. (Features in memory were checked before.)
        """
        x = self.features[name]
        found = only_valid(x[rows], self.masks[name][rows] if name in self.masks else None)
        if not isinstance(x, Tensor):
            check_finite(f"{self.folder or 'clips'}: {name}", found, rows)
        return found

    def labels_of(self, name: str) -> Tensor:
        """The class of each clip, int64 [N]; -1 in split 0 and for clips without the modality."""
        return torch.where(self.valid(name).any(1), self.labels, -1)

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

    def with_features(self, features: Mapping[str, Rows]) -> Clips:
        """The same clips with other features of the same modalities."""
        return replace(self, features=features)

    def only(self, names: Iterable[str]) -> Clips:
        """The same clips, in the modalities `names` only."""
        names = tuple(names)
        return replace(
            self,
            features={name: self.features[name] for name in names},
            segment_labels={
                name: self.segment_labels[name] for name in names if name in self.segment_labels
            },
            masks={name: self.masks[name] for name in names if name in self.masks},
        )


def only_valid(x: Tensor, mask: Tensor | None) -> Tensor:
    """Replace segments of [n, T, ..., C] by zeros where the mask bool [n, T] is False."""
    return x if mask is None else torch.where(mask.view(*mask.shape, *[1] * (x.ndim - 2)), x, 0)


def check_finite(where: str, x: Tensor, rows: Tensor | None = None) -> None:
    """Check clips [n, ...].

    Args:
        where: The modality, for messages.
        x: The clips.
        rows: Their indices, for messages; None: 0 to n - 1.

    Raises:
        DataError: An element is NaN or Inf.
    """
    for n, clip in enumerate(x):  # a sum is much faster than `isfinite`
        if not clip.sum(dtype=torch.float32).isfinite() and not clip.isfinite().all():
            clip_number = n if rows is None else int(rows[n])
            raise DataError(f"{where}: must be finite; got NaN or Inf in clip {clip_number}.")
