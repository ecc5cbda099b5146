"""Uni-Code: encoders, decoders and losses around one shared codebook (Fig. 2(a))."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import combinations
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
from mmvq.distributed import average_, gather_batch_sizes
from mmvq.functional import info_nce

from .codebook_size import choose_codes, first_codes
from .encoders import Decoder, SemanticEncoder, SpecificEncoder
from .errors import DataError
from .ranks import from_first_rank

PARTS = ("club", "contrast", "cpc", "mm-ema", "reset", "matching")  # what --without can leave out


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
        codebook_size: Number of codes L. None: chosen from the data, see `codebook_size`.
        decay: Decay of the moving average.
        reset_after: Batches until an unused code is reset.
        beta: Weight of the commitment loss.
        cross_ratio: Weight of its cross-modal term relative to its own.
        temperature: Temperature of the contrast and of Cross-CPC.
        cpc: Arguments of `CrossCPC`, with one random start in each batch. None: each segment is
            predicted from the segments of another modality up to that time, at all times.
        partner: Partner of the moving average: "attention", "aligned" or "none".
        partner_weight: Weight of the partner. None: 1 - 1/M, the mean of all M modalities.
        assignment: Codes that the moving average updates: those of the features ("own") or those
            of the mixtures with the partner ("mixed").
        reset_rule: Rule of the reset: "all" or "any".
        club: What is minimised: "penalty" (`CLUBEstimator.penalty`) or "bound" (Eq. 5).
        club_negatives: Negatives of the bound: "all" or "shuffled".
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
    codebook_size: int | None = None
    decay: float = 0.98
    reset_after: int = 20
    beta: float = 1.0
    cross_ratio: float = 2.0
    temperature: float = 0.1
    cpc: Mapping[str, Any] | None = None
    partner: Literal["attention", "aligned", "none"] = "aligned"
    partner_weight: float | None = None
    assignment: Literal["own", "mixed"] = "mixed"
    reset_rule: Literal["all", "any"] = "all"
    club: Literal["penalty", "bound"] = "penalty"
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
        names = tuple(c.shapes)

        def each(build: Callable[[int, int], nn.Module]) -> nn.ModuleDict:
            return nn.ModuleDict({name: build(P, C) for name, (P, C) in c.shapes.items()})

        inside: dict[str, Any] = {"width": c.width, "heads": c.heads, "dropout": c.dropout}
        self.semantic = each(lambda P, C: SemanticEncoder(C, P, c.dim, **inside))
        self.specific = each(lambda P, C: SpecificEncoder(C, P, c.specific_dim))
        self.decoder = each(lambda P, C: Decoder(c.dim + c.specific_dim, P, C))
        self.quantizer = self._quantizer(c.codebook_size or 1)
        self.cpc = self._cpc() if "cpc" not in c.without else None
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

    def _quantizer(self, codebook_size: int) -> MultiModalEMAQuantizer:
        c, M = self.config, len(self.config.shapes)
        joint = "mm-ema" not in c.without
        return MultiModalEMAQuantizer(
            c.dim,
            codebook_size,
            tuple(c.shapes),
            decay=c.decay,
            partner=c.partner if joint else "none",
            partner_weight=1 - 1 / M if c.partner_weight is None else c.partner_weight,
            assignment=c.assignment if joint else "own",
            reset_after=None if "reset" in c.without else c.reset_after,
            reset_rule=c.reset_rule,
            commitment=CrossModalCommitmentLoss(c.beta, c.cross_ratio if joint else 0.0),
        )

    def _cpc(self) -> CrossCPC:
        c = self.config
        whole: dict[str, Any] = {
            "first_step": 0,
            "normalize_over": "both",
            "temperature": c.temperature,
            "normalize": True,
        }
        cpc = CrossCPC(c.dim, tuple(c.shapes), **(whole if c.cpc is None else c.cpc), gather=True)
        shortest = cpc.min_context + cpc.first_step + cpc.num_steps - 1
        if c.segments < shortest:
            raise DataError(
                f"clips: Cross-CPC predicts segments ahead, which takes {shortest} or more; "
                f"got {c.segments}. Hint: --without cpc, or the preset digits."
            )
        return cpc

    @torch.no_grad()
    def start_codebook(
        self, features: Mapping[str, Tensor], held_out: Mapping[str, Tensor]
    ) -> None:
        """Begin the codebook from clips, with the size of the config or one chosen from the data.

        Args:
            features: Name -> clips to train on, [N, T, P, C].
            held_out: Name -> other clips, [N', T, P, C], to choose the size on.
        """
        z, size = self.semantic_features(features), self.config.codebook_size
        if size is None:
            codes = choose_codes(z, self.semantic_features(held_out))
        else:
            codes = first_codes(z, size)
        codes = from_first_rank(codes)
        self.resize_codebook(len(codes))
        self.quantizer.set_codes(codes)

    def resize_codebook(self, codebook_size: int) -> None:
        """Replace the codebook by a new one of this size."""
        device = self.quantizer.ema_codebook.codes.device
        self.config = replace(self.config, codebook_size=codebook_size)
        self.quantizer = self._quantizer(codebook_size).to(device).train(self.training)

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
        scale = {name: p.where(p > 0, torch.inf) for name, p in power.items()}  # 0 if constant
        errors = [
            (self.decoder[name](decoded[name], specific[name]) - v).square().mean() / scale[name]
            for name, v in x.items()
        ]
        terms["reconstruction"] = torch.stack(errors).mean()  # Eq. 3
        if self.cpc is not None:
            start = "all" if self.config.cpc is None else None
            terms["cpc"] = self.cpc(z, start=start).loss  # Eq. 6
        if "contrast" not in self.config.without:
            terms["contrast"] = self._contrast(z)
        if self.club:
            shared = [self._club(club, z[name], specific[name]) for name, club in self.club.items()]
            terms["club"] = torch.stack(shared).mean()  # Sec. 4.2
        return terms

    @torch.no_grad()
    def quantize(
        self, features: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Codes [N, T, D] and indices [N, T] of clips [N, T, P, C], on the CPU, in eval mode."""
        z = self.semantic_features(features)
        indices = {name: self.quantizer.encode(x) for name, x in z.items()}
        codes = {name: self.quantizer.decode(i).cpu() for name, i in indices.items()}
        return codes, {name: i.cpu() for name, i in indices.items()}

    @torch.no_grad()
    def semantic_features(
        self, features: Mapping[str, Tensor], batch_size: int = 100
    ) -> dict[str, Tensor]:
        """Semantic features [N, T, D] of clips [N, T, P, C], in eval mode."""
        training, device = self.training, next(self.parameters()).device
        self.eval()
        z = {
            name: torch.cat([self.semantic[name](part.to(device)) for part in x.split(batch_size)])
            for name, x in features.items()
        }
        self.train(training)
        return z

    def _club(self, club: CLUBEstimator, z: Tensor, specific: Tensor) -> Tensor:
        return club.penalty(z, specific) if self.config.club == "penalty" else club(z, specific)

    def club_fit(self, features: Features) -> Tensor:
        """The loss of CLUB's own networks, without a gradient to the features."""
        losses = [
            club.learning_loss(features.semantic[name], features.specific[name])
            for name, club in self.club.items()
        ]
        return torch.stack(losses).sum()

    def _contrast(self, z: Mapping[str, Tensor]) -> Tensor:
        """InfoNCE of the features themselves, in addition to the paper.

        Features of two modalities at the same segment identify each other among all clips of the
        batch. Cross-CPC, which compares through a network, leaves them apart.
        """
        a, b = zip(*combinations(z, 2), strict=True)
        batch = gather_batch_sizes("UniCode", z[a[0]], None, names=z, T=z[a[0]].shape[1])
        query, key = (
            torch.stack([rearrange(z[m], "b t d -> t b d") for m in side]) for side in (a, b)
        )
        return info_nce(
            query,
            key,
            temperature=self.config.temperature,
            normalize=True,
            symmetric=True,
            batch=batch,
        )


def _as_clips(z: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Treat every segment as a clip: `[B, T, D]` -> `[B T, 1, D]`."""
    return {name: rearrange(v, "b t d -> (b t) 1 d") for name, v in z.items()}
