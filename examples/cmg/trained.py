"""A trained model for use: raw features in, tokens, code vectors and classes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .clips import BACKGROUND, Clips, check_finite, only_valid
from .containers import Rows
from .errors import DataError
from .heads import Codes, Head, Heads, over_time
from .model import UniCode
from .serving import write_onnx
from .standardize import Standardizer

_AT_ONCE = 100  # clips
Features = Mapping[str, Rows]
Masks = Mapping[str, Tensor]


@dataclass(frozen=True)
class About:
    """What a run keeps about the data that it was trained on.

    Attributes:
        encoders: Name -> name of the encoder of the features; may be empty.
        class_names: Names of the classes; may be empty.
        seconds: Length of a clip; None: not known.
        grids: Name -> shape of the cells of a segment, such as [7, 7]; empty for a vector.
    """

    encoders: Mapping[str, str] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    seconds: float | None = None
    grids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, clips: Clips) -> About:
        """What to keep of clips with raw features."""
        grids = {name: tuple(x.shape[2:-1]) for name, x in clips.features.items()}
        return cls(clips.encoders, clips.class_names, clips.seconds, grids)


class Prediction(NamedTuple):
    """Predicted classes.

    Attributes:
        label: int64, the most probable class.
        probability: float64, its probability; 0 where nothing is valid.
    """

    label: Tensor
    probability: Tensor


class TrainedModel(nn.Module):
    """The encoders and the codebook of a run, frozen, with all that their use needs.

    `UniCode.from_pretrained` gives one. Features are name -> raw features [N, T, ..., C] of any of
    the modalities, for any N and T: float tensors, or anything with a shape that is read when
    indexed (see `containers.Rows`). They are read a few clips at a time. Masks are name -> bool
    [N, T], True = valid; modalities without one are valid. Results are on the CPU.

    Attributes:
        config: Settings of the model.
        about: What is known of the features and classes.
        heads: Classifiers of codes; empty if the run was trained without labels.
        standardize: Name -> the affine map of its raw features.
        semantic: Name -> its encoder.
        quantizer: The quantizer with the shared codebook.
    """

    def __init__(
        self, source: str, parts: UniCode, standardizer: Standardizer, heads: Heads, about: About
    ) -> None:
        super().__init__()
        self.source, self.config, self.heads, self.about = source, parts.config, heads, about
        self.standardize = nn.ModuleDict(
            {
                name: _Affine(mean, standardizer.axes[name])
                for name, mean in standardizer.mean.items()
            }
        )
        self.semantic, self.quantizer = parts.semantic, parts.quantizer
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TrainedModel:
        """Stay in eval mode."""
        return super().train(False)

    @property
    def codebook(self) -> Tensor:
        """The codes [L, D]."""
        return self.quantizer.codebook

    def tokens(self, features: Features, masks: Masks | None = None) -> dict[str, Tensor]:
        """The codes of clips: name -> int64 [N, T], -1 where not valid.

        Raises:
            DataError: Features or masks do not fit the model, or are not finite.
        """
        found: dict[str, Tensor] = {}
        for name, x in features.items():
            found[name] = torch.full(tuple(x.shape[:2]), -1)
            for rows, z, valid in self._encoded(name, x, masks):
                chosen = self.quantizer.encode(z)
                found[name][rows] = chosen.cpu() if valid is None else chosen.cpu().where(valid, -1)
        return found

    def semantic_features(
        self, features: Features, masks: Masks | None = None
    ) -> dict[str, Tensor]:
        """Features z before quantization: name -> float32 [N, T, D], arbitrary where not valid.

        Raises:
            DataError: As in `tokens`.
        """
        return {
            name: torch.cat([z.cpu() for _, z, _ in self._encoded(name, x, masks)])
            for name, x in features.items()
        }

    def vectors(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The codes of tokens int64 [N, T]: name -> float32 [N, T, D], zeros where -1.

        Raises:
            DataError: Tokens are not those of this model.
        """
        return {name: self._codes(name, i)[:] for name, i in tokens.items()}

    def classify(
        self, features: Features, masks: Masks | None = None, *, labels_from: str
    ) -> dict[str, Prediction]:
        """The class of each clip, [N], by the labels of one modality; -1 where nothing is valid.

        Args:
            features: Features in any modalities.
            masks: Masks of the features.
            labels_from: Modality whose labels the classifier was trained on.

        Raises:
            DataError: As in `tokens`, or there is no such classifier.
        """
        return self.classify_tokens(self.tokens(features, masks), labels_from)

    def classify_tokens(
        self, tokens: Mapping[str, Tensor], labels_from: str
    ) -> dict[str, Prediction]:
        """As `classify`, of the tokens of clips int64 [N, T].

        Raises:
            DataError: There is no such classifier, or tokens are not those of this model.
        """
        head = self._head(self.heads.clips, labels_from)

        def predict(codes: Codes, rows: Tensor) -> Prediction:
            valid = codes.indices[rows] >= 0
            return _predict(head, over_time(codes[rows], valid), valid.any(1))

        return self._each(tokens, predict)

    def localize(
        self, features: Features, masks: Masks | None = None, *, labels_from: str
    ) -> dict[str, Prediction]:
        """The class of each segment, [N, T]; -1 for background and where it is not valid.

        Args:
            features: Features in any modalities.
            masks: Masks of the features.
            labels_from: Modality whose labels the classifier was trained on.

        Raises:
            DataError: As in `classify`.
        """
        head = self._head(self.heads.segments, labels_from, "segments")

        def predict(codes: Codes, rows: Tensor) -> Prediction:
            label, probability = _predict(head, codes[rows], codes.indices[rows] >= 0)
            return Prediction((label + BACKGROUND).clamp(min=BACKGROUND), probability)

        return self._each(self.tokens(features, masks), predict)

    def class_name(self, label: int) -> str:
        """The name of a class; the number itself if it has none, as -1."""
        names = self.about.class_names
        return names[label] if 0 <= label < len(names) else str(label)

    def export_onnx(self, path: str | Path, modality: str) -> None:
        """Write an ONNX model from raw features of a modality to tokens.

        Its inputs are "features", float32 [N, T, *grid, C] (see `grid`), and "mask", bool [N, T],
        True = valid. Its output "tokens" is int64 [N, T], -1 where not valid. N and T are dynamic.
        Of two codes whose distances differ by floating-point error alone, it may choose the other.

        Args:
            path: The file to write.
            modality: A modality of the model.

        Raises:
            DataError: The model has no such modality, the file cannot be written, or onnx or
                onnxscript is not installed.
        """
        write_onnx(self, path, modality)

    def _codes(self, name: str, tokens: Tensor) -> Codes:
        tokens, L = torch.as_tensor(tokens), len(self.codebook)
        kind = f"{tokens.dtype}{list(tokens.shape)}"
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise DataError(f"tokens of {name}: must be int [N, T]; got {kind}.")
        if ((tokens < -1) | (tokens >= L)).any():
            rule = f"must be -1 to {L - 1}, of a model with {L} codes"
            raise DataError(f"tokens of {name}: {rule}; got up to {int(tokens.max())}.")
        return Codes(tokens.long(), self.codebook)

    def _each(
        self, tokens: Mapping[str, Tensor], predict: Callable[[Codes, Tensor], Prediction]
    ) -> dict[str, Prediction]:
        found: dict[str, Prediction] = {}
        for name, i in tokens.items():
            codes = self._codes(name, i)
            parts = [predict(codes, rows) for rows in torch.arange(len(i)).split(_AT_ONCE)]
            found[name] = Prediction(*map(torch.cat, zip(*parts, strict=True)))
        return found

    def _head(self, heads: Mapping[str, Head], name: str, kind: str = "clips") -> Head:
        if not heads:
            rule = f"has no classifiers of {kind}"
            why = "it was trained by an earlier version, or on data without their labels"
            raise DataError(f"{self.source}: {rule}; {why}. Hint: train it again, with labels.")
        if name not in heads:
            rule = f"has classifiers of {kind} from labels of {', '.join(heads)}"
            raise DataError(f"{self.source}: {rule}; got {name!r}.")
        return heads[name]

    @torch.no_grad()
    def _encoded(
        self, name: str, x: Rows, masks: Masks | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Rows, their features z on the device, and their mask; a few clips at a time."""
        mask = torch.as_tensor(masks[name]) if masks and name in masks else None
        self._check(name, x, mask)
        for rows in torch.arange(x.shape[0]).split(_AT_ONCE):
            part, valid = torch.as_tensor(x[rows]).float(), None
            if mask is not None:
                valid = mask[rows].cpu()
                part = only_valid(part, valid.to(part.device))
            check_finite(name, part, rows)
            device = self.codebook.device
            here = None if valid is None else valid.to(device)
            yield rows, self.encode(name, part.to(device), here), valid

    def encode(self, name: str, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features z [N, T, D] of a modality, of raw float32 features on the model's device."""
        x = rearrange(self.standardize[name](x), "n t ... c -> n t (...) c")
        z: Tensor = self.semantic[name](x, mask)
        return z

    def _check(self, name: str, x: Rows, mask: Tensor | None) -> None:
        shape, kind = tuple(x.shape), getattr(x, "dtype", "")
        grid, C = self.grid(name), self.channels(name)
        fits = len(shape) > 2 and shape[1] > 0 and (prod(shape[2:-1]), shape[-1]) == (prod(grid), C)
        if not fits or (isinstance(x, Tensor) and not x.is_floating_point()):
            wanted = ", ".join(map(str, ("N", "T", *grid, C)))
            rule = f"the model takes {name} float [{wanted}]"
            got = f"{kind}{list(shape)}".removeprefix("torch.")
            raise DataError(f"{self.source}: {rule}; got {got}.")
        if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != shape[:2]):
            got = f"{mask.dtype}{list(mask.shape)}".removeprefix("torch.")
            raise DataError(f"mask of {name}: must be bool {list(shape[:2])}; got {got}.")

    def grid(self, name: str) -> tuple[int, ...]:
        """The shape of the cells of a segment, such as (7, 7); () for a vector.

        It is (49,) if an earlier version saved the run.

        Raises:
            DataError: The model has no such modality.
        """
        if name not in self.semantic:
            known = ", ".join(self.semantic)
            raise DataError(f"{self.source}: the model takes {known}; got {name!r}.")
        P = self.config.shapes[name][0]
        return tuple(self.about.grids.get(name, () if P == 1 else (P,)))

    def channels(self, name: str) -> int:
        """Number of channels C of the raw features."""
        return len(self.get_buffer(f"standardize.{name}.mean"))


class _Affine(nn.Module):
    """y = (x - mean) @ axes, [..., C] -> [..., width]; see `Standardizer`."""

    mean: Tensor
    axes: Tensor

    def __init__(self, mean: Tensor, axes: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("axes", axes)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) @ self.axes


def _predict(head: Head, x: Tensor, valid: Tensor) -> Prediction:
    probability, place = head.probabilities(x).max(-1)
    return Prediction(head.classes[place].where(valid, -1), probability.where(valid, 0))
