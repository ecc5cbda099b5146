"""A finished pre-training for downstream tasks: a frozen model, and the clips of its training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from .clips import Clips
from .containers import Rows
from .model import Config, UniCode
from .trained import TrainedModel

Coded = tuple[dict[str, Tensor], dict[str, Tensor]]  # name -> codes [N, T, D], indices [N, T]


@dataclass(frozen=True)
class TrainedRun:
    """A trained model of `cmg_pretrain.py` or of an experiment, and its clips.

    Attributes:
        clips: Clips of the data set that it was trained on, with raw features.
        seed: Seed of training, also used for the tasks.
        model: The trained model.
    """

    clips: Clips
    seed: int
    model: TrainedModel

    @classmethod
    def load(cls, folder: str | Path, clips: Clips, seed: int) -> TrainedRun:
        """Load a model folder.

        Raises:
            DataError: There is no model in the folder, it is of another version of this example,
                or the clips do not fit it.
        """
        model = UniCode.from_pretrained(folder)
        for name in model.semantic:
            clips.require(name, model.config.segments, model.channels(name), f"{folder}")
        return cls(clips, seed, model)

    @property
    def config(self) -> Config:
        """Settings of the model."""
        return self.model.config

    def quantize(
        self, features: Mapping[str, Rows], masks: Mapping[str, Tensor] | None = None
    ) -> Coded:
        """Quantize clips in any modalities of the run, see `TrainedModel.tokens`.

        Returns:
            Name -> quantized vectors [N, T, D], and name -> int64 indices [N, T], zeros and -1
            where not valid.
        """
        indices = self.model.tokens(features, masks)
        return self.model.vectors(indices), indices

    @cached_property
    def codes(self) -> Coded:
        """The run's own clips quantized, as by `quantize`."""
        own = self.clips.only(self.config.shapes)
        return self.quantize(own.features, own.masks)

    def semantic(self) -> dict[str, Tensor]:
        """Semantic features z [N, T, D] of the run's own clips; arbitrary where not valid."""
        own = self.clips.only(self.config.shapes)
        return self.model.semantic_features(own.features, own.masks)


Task = Callable[[TrainedRun], dict[str, Any]]  # nested dicts of numbers
