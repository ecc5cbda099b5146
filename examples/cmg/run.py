"""A finished pre-training for downstream tasks: a frozen model from features to codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .batches import Batches
from .checkpoint import load_model
from .clips import Clips
from .containers import Rows
from .errors import DataError
from .heads import Codes
from .model import Config, UniCode
from .standardize import Standardizer

Coded = tuple[dict[str, Tensor], dict[str, Tensor]]  # name -> codes [N, T, D], indices [N, T]


@dataclass(frozen=True)
class TrainedRun:
    """A trained model of `cmg_pretrain.py` or of an experiment, and its clips.

    Attributes:
        clips: Clips of the data set that it was trained on, with raw features.
        config: Settings of the model.
        seed: Seed of training, also used for the tasks.
        model: Model with the trained semantic encoders and codebook. Its other parts have no data,
            and Cross-CPC is left out.
        standardizer: Standardizer of the features.
    """

    clips: Clips
    config: Config
    seed: int
    model: UniCode
    standardizer: Standardizer

    @classmethod
    def load(cls, folder: str | Path, clips: Clips, seed: int) -> TrainedRun:
        """Load a model folder.

        Raises:
            DataError: There is no model in the folder, it is of another version of this example,
                or the clips do not fit it.
        """
        tensors, content = load_model(folder)
        try:
            standardizer = Standardizer.from_tensors(tensors)
            config = Config(**content)
            shapes = {name: (cells, channels) for name, (cells, channels) in config.shapes.items()}
            config = replace(config, shapes=shapes, without=tuple(config.without))
            # a config may ask for any size: memory is that of the file's tensors
            with torch.device("meta"):
                model = UniCode(replace(config, without=(*config.without, "cpc")))
            semantic = {name: x.float() for name, x in _part(tensors, "semantic.").items()}
            model.semantic.load_state_dict(semantic, assign=True)
            model.quantizer.load_state_dict(_part(tensors, "quantizer."), assign=True)
            for name, (_, width) in shapes.items():
                if standardizer.axes[name].shape != (len(standardizer.mean[name]), width):
                    raise ValueError(f"the standardizer of {name} does not fit")
            if odd := [name for name, x in tensors.items() if not x.isfinite().all()]:
                raise ValueError(f"{odd[0]} is not finite")
        except Exception as error:  # a config can hold anything
            rule = "a model of another version of this example, or damaged"
            first = str(error).partition("\n")[0]
            raise DataError(f"{folder}: {rule} ({first}). Hint: train it again.") from error
        for name, mean in standardizer.mean.items():
            clips.require(name, config.segments, len(mean), f"{folder}")
        return cls(clips, config, seed, model.eval().requires_grad_(False), standardizer)

    def quantize(
        self, features: Mapping[str, Rows], masks: Mapping[str, Tensor] | None = None
    ) -> Coded:
        """Quantize clips in any modalities of the run.

        Args:
            features: Name -> raw features [N, T, ..., C], C as in training.
            masks: Name -> bool [N, T], True = valid; modalities without one are valid.

        Returns:
            Name -> quantized vectors [N, T, D], and name -> int64 indices [N, T], zeros and -1
            where not valid.
        """
        return self._coded(Batches(Clips.of(features, masks), self.standardizer))

    @cached_property
    def batches(self) -> Batches:
        """The run's own clips, in the modalities of the model."""
        return Batches(self.clips.only(self.config.shapes), self.standardizer)

    @cached_property
    def codes(self) -> Coded:
        """The run's own clips quantized, as by `quantize`."""
        return self._coded(self.batches)

    def semantic(self) -> dict[str, Tensor]:
        """Semantic features z [N, T, D] of the run's own clips; arbitrary where not valid."""
        rows = torch.arange(len(self.clips.split))
        return self.model.semantic_features(self.batches, rows)[0]

    def _coded(self, batches: Batches) -> Coded:
        indices, codebook = self.model.quantize(batches), self.model.quantizer.codebook
        return {name: Codes(i, codebook)[:] for name, i in indices.items()}, indices


Task = Callable[[TrainedRun], dict[str, Any]]  # nested dicts of numbers


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
