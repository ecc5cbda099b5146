"""Uni-Code: encoders, decoders and losses around one shared codebook (Fig. 2(a))."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

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

from .batches import Batch, Batches
from .codebook_size import choose_codes, first_codes
from .encoders import Decoder, SemanticEncoder, SpecificEncoder
from .errors import DataError
from .ranks import from_first_rank

if TYPE_CHECKING:
    from .trained import TrainedModel

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
        matching: What code matching identifies: "segments", among all of the batch, or "clips", as
            in the paper.
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
    matching: Literal["segments", "clips"] = "segments"
    without: tuple[str, ...] = ()

    @classmethod
    def of(cls, batches: Batches, **settings: Any) -> Config:
        """The config for a data set; `settings` are the other fields."""
        return cls(batches.shapes, batches.segments, **settings)

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

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> TrainedModel:
        """Load what `cmg_pretrain.py` saved, for use: frozen, on the CPU, in eval mode.

        Nothing is unpickled, and the sizes in the config are compared with the tensors of the file
        before memory is allocated.

        Args:
            source: A folder, or a repository "user/name" on the Hub (extra `hub`), with
                model.safetensors.
            revision: Branch, tag or commit of the repository.
            token: Access token of the Hub.
            cache_dir: Folder of the downloaded files.
            local_files_only: Whether to use the cache alone.

        Raises:
            DataError: There is no such model, or it is damaged or of another version of this
                example.
        """
        from .stored import load_run  # which needs this class

        return load_run(
            source,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )

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
    def start_codebook(self, batches: Batches, rows: Tensor, held_out: Tensor) -> None:
        """Begin the codebook from clips, with the size of the config or one chosen from the data.

        Args:
            batches: The data set.
            rows: Indices of the clips to train on.
            held_out: Indices of other clips, to choose the size on.
        """
        (z, masks), size = self.semantic_features(batches, rows), self.config.codebook_size
        if size is None:
            others, others_masks = self.semantic_features(batches, held_out)
            codes = choose_codes(z, others, masks, others_masks)
        else:
            codes = first_codes(z, size, masks)
        codes = from_first_rank(codes)
        self.resize_codebook(len(codes))
        self.quantizer.set_codes(codes)

    def resize_codebook(self, codebook_size: int) -> None:
        """Replace the codebook by a new one of this size."""
        device = self.quantizer.ema_codebook.codes.device
        self.config = replace(self.config, codebook_size=codebook_size)
        self.quantizer = self._quantizer(codebook_size).to(device).train(self.training)

    def encode(self, batch: Batch) -> Features:
        """Semantic and specific features of a batch (Eq. 1)."""
        x, masks = batch.features, batch.masks or {}
        return Features(
            {name: self.semantic[name](v, masks.get(name)) for name, v in x.items()},
            {name: self.specific[name](v) for name, v in x.items()},
        )

    def losses(self, batch: Batch, features: Features, *, quantize: bool) -> dict[str, Tensor]:
        """Compute each term of the objective; in training mode, also update the codebook.

        Args:
            batch: The batch.
            features: Features of the batch, as returned by `encode`.
            quantize: Whether to use the codebook. If False (early in training), decode from the
                features and leave out the terms that need codes.
        """
        x, masks = batch
        z, specific = features
        terms: dict[str, Tensor] = {}
        decoded = z
        if quantize:
            decoded, _, terms["commitment"] = self.quantizer(z, masks)  # Eq. 2, 7, 8
            if "matching" not in self.config.without:
                terms["matching"] = self._matching(z, masks)
        terms["reconstruction"] = self._reconstruction(x, decoded, specific, masks)  # Eq. 3
        if self.cpc is not None:
            start = "all" if self.config.cpc is None else None
            terms["cpc"] = self.cpc(z, masks, start=start).loss  # Eq. 6
        if "contrast" not in self.config.without:
            terms["contrast"] = self._contrast(z, masks)
        if self.club:
            shared = [
                self._club(club, z[name], specific[name], masks and masks[name])
                for name, club in self.club.items()
            ]
            terms["club"] = torch.stack(shared).mean()  # Sec. 4.2
        return terms

    @torch.no_grad()
    def quantize(self, batches: Batches, rows: Tensor | None = None) -> dict[str, Tensor]:
        """Codes of clips in eval mode: name -> int64 [N, T] on the CPU, -1 where not valid.

        Args:
            batches: The data set of N clips.
            rows: Indices of the clips to quantize; the others get -1. None: all.
        """
        N = len(batches.clips.split)
        rows = torch.arange(N) if rows is None else rows
        indices = {name: torch.full((N, batches.segments), -1) for name in batches.shapes}
        start = 0
        for z, masks in self._in_eval_mode(batches, rows):
            here = rows[start : start + len(next(iter(z.values())))]
            start += len(here)
            for name, x in z.items():
                chosen = self.quantizer.encode(x)
                if masks is not None:
                    chosen = torch.where(masks[name], chosen, -1)
                indices[name][here] = chosen.cpu()
        return indices

    @torch.no_grad()
    def semantic_features(
        self, batches: Batches, rows: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """Semantic features [n, T, D] and masks [n, T] of clips, in eval mode."""
        parts = [*self._in_eval_mode(batches, rows)]
        z = {name: torch.cat([x[name] for x, _ in parts]) for name in batches.shapes}
        if not batches.clips.masks:
            return z, None
        return z, {name: torch.cat([m[name] for _, m in parts if m]) for name in z}

    def _in_eval_mode(
        self, batches: Batches, rows: Tensor
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor] | None]]:
        """Semantic features and masks, a batch at a time."""
        training, device = self.training, next(self.parameters()).device
        self.eval()
        try:
            for x, masks in batches(rows, device):
                given = masks or {}
                yield (
                    {name: self.semantic[name](v, given.get(name)) for name, v in x.items()},
                    masks,
                )
        finally:
            self.train(training)

    def _reconstruction(
        self,
        x: Mapping[str, Tensor],
        semantic: Mapping[str, Tensor],
        specific: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None,
    ) -> Tensor:
        """Mean over the modalities of squared error / mean square, over valid segments."""
        weight: dict[str, Tensor] = {}
        if masks is not None:  # 1 / share of valid segments on all ranks, so that means stay means
            share = {name: m.float().mean() for name, m in masks.items()}
            average_(share.values())
            weight = {m: masks[m] / s.where(s > 0, torch.inf) for m, s in share.items()}

        def mean(name: str, v: Tensor) -> Tensor:
            if name not in weight:
                return v.mean()
            return (v.flatten(2).mean(2) * weight[name]).mean()

        power = {name: mean(name, v.square()) for name, v in x.items()}
        average_(power.values())
        scale = {name: p.where(p > 0, torch.inf) for name, p in power.items()}  # 0 if constant
        errors = []
        for name, v in x.items():
            error = self.decoder[name](semantic[name], specific[name]) - v
            errors.append(mean(name, error.square()) / scale[name])
        return torch.stack(errors).mean()

    def _matching(self, z: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None) -> Tensor:
        if self.config.matching == "segments":
            z, masks = _as_clips(z), masks and _as_clips(masks)
        loss: Tensor = self.matching(z, self.quantizer.codebook, masks)
        return loss

    def _club(
        self, club: CLUBEstimator, z: Tensor, specific: Tensor, mask: Tensor | None
    ) -> Tensor:
        measure = club.penalty if self.config.club == "penalty" else club
        return measure(z, specific, mask)

    @torch.no_grad()
    def club_saturation(self, batches: Batches, rows: Tensor) -> dict[str, float]:
        """Name -> share of the log-variances of CLUB at their bound, if Eq. 5 is minimised."""
        if self.config.club != "bound":
            return {}
        z, masks = self.semantic_features(batches, rows)
        found: dict[str, float] = {}
        for name, club in self.club.items():
            valid = z[name] if masks is None else z[name][masks[name]]
            bound = club.posterior(valid)[1].abs() > 0.99 * club.logvar_bound
            found[name] = float(bound.float().mean())
        return found

    def club_fit(self, features: Features, masks: Mapping[str, Tensor] | None) -> Tensor:
        """The loss of CLUB's own networks, without a gradient to the features."""
        losses = [
            club.learning_loss(
                features.semantic[name], features.specific[name], masks and masks[name]
            )
            for name, club in self.club.items()
        ]
        return torch.stack(losses).sum()

    def _contrast(self, z: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None) -> Tensor:
        """InfoNCE of the features themselves, in addition to the paper.

        Features of two modalities at the same segment identify each other among all clips of the
        batch. Cross-CPC, which compares through a network, leaves them apart.
        """
        a, b = zip(*combinations(z, 2), strict=True)
        batch = gather_batch_sizes("UniCode", z[a[0]], None, names=z, T=z[a[0]].shape[1])
        query, key = (
            torch.stack([rearrange(z[m], "b t d -> t b d") for m in side]) for side in (a, b)
        )
        mask = None
        if masks is not None:
            valid = [masks[m] & masks[n] for m, n in zip(a, b, strict=True)]
            mask = rearrange(torch.stack(valid), "p b t -> p t b")
        return info_nce(
            query,
            key,
            mask=mask,
            temperature=self.config.temperature,
            normalize=True,
            symmetric=True,
            batch=batch,
        )


def _as_clips(z: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Treat every segment as a clip: `[B, T, ...]` -> `[B T, 1, ...]`."""
    return {name: rearrange(v, "b t ... -> (b t) 1 ...") for name, v in z.items()}
