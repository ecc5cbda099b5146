"""A finished pre-training as the downstream tasks see it: frozen, features in, codes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from cmg.checkpoint import load_model
from cmg.data import Clips
from cmg.errors import DataError
from cmg.model import Config, UniCode
from cmg.standardize import Standardizer

Codes = tuple[dict[str, Tensor], dict[str, Tensor]]  # codes [N, T, D] and their indices [N, T]


@dataclass(frozen=True)
class TrainedRun:
    """A model folder of `cmg_pretrain` or of an experiment, and the clips it was trained on.

    Attributes:
        clips: The clips, features as the file holds them.
        config: Of the model.
        seed: Of its training; the heads of the tasks take the same.
        model: Its encoders and its codebook, as trained; its other parts are not.
        standardizer: Of its features.
    """

    clips: Clips
    config: Config
    seed: int
    model: UniCode
    standardizer: Standardizer

    @classmethod
    def load(cls, folder: str | Path, clips: Clips, seed: int) -> TrainedRun:
        """Read a model folder.

        Raises:
            DataError: There is no model in the folder, or the clips are not of its modalities.
        """
        tensors, content = load_model(folder)
        shapes = {name: (cells, channels) for name, (cells, channels) in content["shapes"].items()}
        config = Config(**content | {"shapes": shapes, "without": tuple(content["without"])})
        standardizer = Standardizer.from_tensors(tensors)
        for name, mean in standardizer.mean.items():
            T, C = config.segments, len(mean)
            x = clips.features.get(name)
            if x is None or (x.shape[1], x.shape[-1]) != (T, C):
                came = "none" if x is None else list(x.shape)
                raise DataError(
                    f"{folder}: its model takes {name} [N, {T}, ..., {C}]; came {came}."
                )
        model = UniCode(config)
        model.semantic.load_state_dict(_part(tensors, "semantic."))
        model.quantizer.load_state_dict(_part(tensors, "quantizer."))
        return cls(clips, config, seed, model.eval().requires_grad_(False), standardizer)

    def quantize(self, features: Mapping[str, Tensor]) -> Codes:
        """Codes of any clips, of any of the run's modalities.

        Args:
            features: Name -> [N, T, ..., C] of raw features, C as in training.

        Returns:
            Name -> quantized vectors [N, T, D], and name -> int64 indices [N, T].
        """
        return self.model.quantize(self.standardizer.cells(features))

    @cached_property
    def codes(self) -> Codes:
        """What `quantize` makes of the run's own clips; they may have modalities it knows not."""
        return self.quantize({name: self.clips.features[name] for name in self.config.shapes})


Task = Callable[[TrainedRun], dict[str, Any]]  # numbers by name, nested as the task likes


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
