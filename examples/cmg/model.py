"""Uni-Code: encoders, decoders and losses around one shared codebook (Fig. 2(a))."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
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
    """Settings of the model; see the modules of mmvq for those of their names.

    Attributes:
        shapes: Name -> (P, C), cells in a segment and channels in a cell.
        segments: Number of segments T.
        dim: Dimension D of semantic features and codes.
        specific_dim: Dimension S of modality-specific features.
        width: Hidden width of the semantic encoders.
        heads: Attention heads of the semantic encoders.
        dropout: Dropout rate of the semantic encoders.
        codebook_size: Number of codes L.
        decay: Decay of the moving average.
        reset_after: Batches until an unused code is reset.
        beta: Weight of the commitment loss.
        cross_ratio: Weight of its cross-modal term relative to its own.
        temperature: Temperature of the two Cross-CPC losses, of segments and of clips.
        cpc: Arguments of a single `CrossCPC` over whole features, with one random start in each
            batch. None builds two: one of segments and one of clips.
        partner: Partner of the moving average: "attention", "aligned" or "none".
        reset_rule: Rule of the reset: "all" or "any".
        club_negatives: Negatives of CLUB: "all" or "shuffled".
        without: Names in PARTS to leave out. Without "mm-ema" the codebook is an ordinary moving
            average, and the commitment loss has no cross-modal term.
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
        """The config for features [N, T, P, C]; `settings` are the other fields."""
        shapes = {name: (x.shape[2], x.shape[3]) for name, x in features.items()}
        return cls(shapes, next(iter(features.values())).shape[1], **settings)

    def json(self) -> dict[str, Any]:
        """The content of config.json."""
        return asdict(self) | {"shapes": {name: list(shape) for name, shape in self.shapes.items()}}


class Features(NamedTuple):
    """Features of a batch: name -> semantic z `[B, T, D]`, and specific z-bar `[B, T, S]`."""

    semantic: dict[str, Tensor]
    specific: dict[str, Tensor]


class UniCode(nn.Module):
    """Encoders, codebook, decoders, and the terms of the objective (Sec. 4).

    Args:
        config: Settings of the model.

    Raises:
        DataError: The clips are too short for the Cross-CPC of the config.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = c = config
        names, joint = tuple(c.shapes), "mm-ema" not in c.without

        def each(build: Callable[[int, int], nn.Module]) -> nn.ModuleDict:
            return nn.ModuleDict({name: build(P, C) for name, (P, C) in c.shapes.items()})

        inside: dict[str, Any] = {"width": c.width, "heads": c.heads, "dropout": c.dropout}
        self.semantic = each(lambda _, C: SemanticEncoder(C, c.segments, c.dim, **inside))
        self.specific = each(lambda P, C: SpecificEncoder(C, P, c.specific_dim))
        self.decoder = each(lambda P, C: Decoder(c.dim + c.specific_dim, P, C))
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
                    f"got {c.segments}. Hint: --without cpc, or the preset digits."
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
        """Semantic and specific features of a batch `[B, T, P, C]` (Eq. 1)."""
        return Features(
            {name: self.semantic[name](v) for name, v in x.items()},
            {name: self.specific[name](v) for name, v in x.items()},
        )

    def losses(
        self, x: Mapping[str, Tensor], features: Features, *, quantize: bool
    ) -> dict[str, Tensor]:
        """Compute each term of the objective; in training mode, also update the codebook.

        Args:
            x: Name -> the batch, `[B, T, P, C]`.
            features: Features of the batch, as returned by `encode`.
            quantize: Whether to use the codebook. If False (early in training), decode from the
                features and leave out the terms that need codes.
        """
        z, specific = features
        terms: dict[str, Tensor] = {}
        decoded = z
        if quantize:
            decoded, _, terms["commitment"] = self.quantizer(z)  # Eq. 2, 7, 8
            if "matching" not in self.config.without:
                terms["matching"] = self.matching(_as_clips(z), self.quantizer.codebook)
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
        """Codes [N, T, D] and indices [N, T] of clips [N, T, P, C], on the CPU, in eval mode."""
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
        """The loss of CLUB's own networks, without a gradient to the features."""
        losses = [
            club.learning_loss(features.semantic[name], features.specific[name])
            for name, club in self.club.items()
        ]
        return torch.stack(losses).sum()

    def _cross_cpc(self, z: Mapping[str, Tensor]) -> Tensor:
        """Cross-CPC of whole features if the config has it, otherwise of segments and of clips.

        The first half of z identifies the segment of another modality among all segments of the
        batch. The second half identifies its clip, from the segments so far, among all clips.
        """
        if "whole" in self.cpc:
            return self.cpc["whole"](z).loss
        segment, clip = {}, {}
        for name, v in z.items():
            segment[name], clip[name] = v.chunk(2, dim=-1)
        of_segments = self.cpc["segment"](_as_clips(segment), start="all").loss
        return (of_segments + self.cpc["clip"](clip, start="all").loss) / 2


def _as_clips(z: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Treat every segment as a clip: `[B, T, D]` -> `[B T, 1, D]`."""
    return {name: rearrange(v, "b t d -> (b t) 1 d") for name, v in z.items()}
