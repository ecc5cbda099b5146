"""Uni-Code: the modules of mmvq around one codebook (Fig. 2(a))."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mmvq import (
    CLUBEstimator,
    CrossCPC,
    CrossModalCodeMatchingLoss,
    CrossModalCommitmentLoss,
    MultiModalEMAQuantizer,
)
from mmvq.distributed import average_

from .encoders import Decoder, SemanticEncoder, SpecificEncoder
from .errors import DataError

PARTS = ("club", "cpc", "mm-ema", "reset", "matching")  # what --without can leave out


@dataclass(frozen=True)
class Config:
    """What to build.

    Attributes:
        shapes: Name -> (P, C), cells of a segment and channels of a cell.
        segments: T.
        dim: D, of the semantic features and the codes.
        specific_dim: S, of the modality-specific features.
        width, heads, dropout: Inside the encoders.
        codebook_size: L.
        decay: Of the moving average.
        reset_after: Batches that a code survives without every modality.
        beta, cross_ratio: Of the commitment loss.
        temperature: Of Cross-CPC at two scales.
        cpc: Arguments of one `CrossCPC` over whole features, with one random start a batch, in the
            place of that at two scales; None: the two scales.
        partner: Of the moving average: "attention", "aligned" or "none".
        reset_rule: "all" or "any".
        club_negatives: "all" or "shuffled".
        without: The parts to leave out, of PARTS. Without "mm-ema" the codebook is an ordinary
            moving average, and the commitment has no cross-modal term.
    """

    shapes: Mapping[str, tuple[int, int]]
    segments: int
    dim: int = 128
    specific_dim: int = 64
    width: int = 64
    heads: int = 4
    dropout: float = 0.2
    codebook_size: int = 128
    decay: float = 0.98
    reset_after: int = 20
    beta: float = 1.0
    cross_ratio: float = 2.0
    temperature: float = 0.1
    cpc: Mapping[str, Any] | None = None
    partner: Literal["attention", "aligned", "none"] = "attention"
    reset_rule: Literal["all", "any"] = "all"
    club_negatives: Literal["all", "shuffled"] = "all"
    without: tuple[str, ...] = ()

    @classmethod
    def of(cls, features: Mapping[str, Tensor], **settings: Any) -> Config:
        """For features [N, T, P, C] of these names and sizes; settings are other fields."""
        shapes = {name: (x.shape[2], x.shape[3]) for name, x in features.items()}
        return cls(shapes, next(iter(features.values())).shape[1], **settings)

    def json(self) -> dict[str, Any]:
        """As config.json has it."""
        return asdict(self) | {"shapes": {name: list(shape) for name, shape in self.shapes.items()}}


class Features(NamedTuple):
    """Two views of a batch: name -> semantic z `[B, T, D]` and specific z-bar `[B, T, S]`."""

    semantic: dict[str, Tensor]
    specific: dict[str, Tensor]


class UniCode(nn.Module):
    """Encoders, codebook, decoders, and the terms of the objective (Sec. 4).

    Args:
        config: What to build.

    Raises:
        DataError: The clips are too short for the Cross-CPC of the config.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = c = config
        names, joint = tuple(c.shapes), "mm-ema" not in c.without
        self.semantic = nn.ModuleDict(
            {
                name: SemanticEncoder(
                    channels,
                    c.segments,
                    c.dim,
                    width=c.width,
                    heads=c.heads,
                    dropout=c.dropout,
                )
                for name, (_, channels) in c.shapes.items()
            }
        )
        self.specific = nn.ModuleDict(
            {
                name: SpecificEncoder(channels, cells, c.specific_dim)
                for name, (cells, channels) in c.shapes.items()
            }
        )
        self.decoder = nn.ModuleDict(
            {
                name: Decoder(c.dim + c.specific_dim, cells, channels)
                for name, (cells, channels) in c.shapes.items()
            }
        )
        self.quantizer = MultiModalEMAQuantizer(
            c.dim,
            c.codebook_size,
            names,
            decay=c.decay,
            partner=c.partner if joint else "none",
            reset_after=None if "reset" in c.without else c.reset_after,
            reset_rule=c.reset_rule,
            commitment=CrossModalCommitmentLoss(c.beta, c.cross_ratio if joint else 0.0),
        )
        self.cpc = nn.ModuleDict()
        if "cpc" not in c.without and c.cpc is not None:
            self.cpc["whole"] = whole = CrossCPC(c.dim, names, **c.cpc, gather=True)
            shortest = whole.min_context + whole.first_step + whole.num_steps - 1
            if c.segments < shortest:
                raise DataError(
                    f"clips: Cross-CPC predicts segments ahead, which takes {shortest} or more; "
                    f"came {c.segments}. Hint: --without cpc, or the preset digits."
                )
        elif "cpc" not in c.without:
            for scale in ("segment", "clip"):
                self.cpc[scale] = CrossCPC(
                    c.dim // 2,
                    names,
                    first_step=0,
                    normalize_over="both",
                    temperature=c.temperature,
                    normalize=True,
                    gather=True,
                )
        self.club = nn.ModuleDict(
            {
                name: CLUBEstimator(
                    c.dim,
                    c.specific_dim,
                    hidden_dim=64,
                    negatives=c.club_negatives,
                    gather=c.club_negatives == "all",
                )
                for name in names
                if "club" not in c.without
            }
        )
        self.matching = CrossModalCodeMatchingLoss(gather=True)

    def encode(self, x: Mapping[str, Tensor]) -> Features:
        """Both features of a batch of `[B, T, P, C]` (Eq. 1)."""
        return Features(
            {name: self.semantic[name](v) for name, v in x.items()},
            {name: self.specific[name](v) for name, v in x.items()},
        )

    def losses(
        self, x: Mapping[str, Tensor], features: Features, *, quantize: bool
    ) -> dict[str, Tensor]:
        """Each term of the objective; in training mode, also move the codebook.

        Args:
            x: The batch.
            features: What `encode` made of it.
            quantize: Decode from codes. While features are still to spread, False: from the
                features themselves, and without the terms that need a codebook.
        """
        z, specific = features
        terms: dict[str, Tensor] = {}
        decoded = z
        if quantize:
            decoded, _, terms["commitment"] = self.quantizer(z)  # Eq. 2, 7, 8
            if "matching" not in self.config.without:
                terms["matching"] = self.matching(_each_alone(z), self.quantizer.codebook)
        power = {name: v.square().mean() for name, v in x.items()}
        average_(power.values())
        errors = [
            (self.decoder[name](decoded[name], specific[name]) - v).square().mean() / power[name]
            for name, v in x.items()
        ]
        terms["reconstruction"] = torch.stack(errors).mean()  # Eq. 3
        if self.cpc:
            terms["cpc"] = self._cross_cpc(z)  # Eq. 6
        if self.club:
            bounds = [club(z[name], specific[name]) for name, club in self.club.items()]
            terms["club"] = torch.stack(bounds).mean()  # Eq. 5
        return terms

    @torch.no_grad()
    def quantize(
        self, features: Mapping[str, Tensor], batch_size: int = 100
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Any clips [N, T, P, C] as codes [N, T, D] and indices [N, T], on the CPU; no training."""
        self.eval()
        device = next(self.parameters()).device
        codes: dict[str, Tensor] = {}
        indices: dict[str, Tensor] = {}
        for name, x in features.items():
            batches = [self.semantic[name](part.to(device)) for part in x.split(batch_size)]
            chosen = torch.cat([self.quantizer.encode(z).cpu() for z in batches])
            indices[name], codes[name] = chosen, self.quantizer.decode(chosen.to(device)).cpu()
        return codes, indices

    def club_fit(self, features: Features) -> Tensor:
        """The loss of CLUB's own networks; no gradient reaches the features."""
        losses = [
            club.learning_loss(features.semantic[name], features.specific[name])
            for name, club in self.club.items()
        ]
        return torch.stack(losses).sum()

    def _cross_cpc(self, z: Mapping[str, Tensor]) -> Tensor:
        """Cross-CPC at two scales, of the half of z that each is about.

        What another modality holds at this segment, among all segments of the batch; and, from the
        clip so far, among all clips. Or the one of the config, of the whole.
        """
        if "whole" in self.cpc:
            return self.cpc["whole"](z).loss
        segment, clip = {}, {}
        for name, v in z.items():
            segment[name], clip[name] = v.chunk(2, dim=-1)
        here = self.cpc["segment"](_each_alone(segment), start="all").loss
        return (here + self.cpc["clip"](clip, start="all").loss) / 2


def _each_alone(z: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every segment as a clip of its own: `[B, T, D]` -> `[B T, 1, D]`."""
    return {name: v.flatten(0, 1)[:, None] for name, v in z.items()}
