"""Uni-Code: the four modules of mmvq, composed (Fig. 2(a))."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmvq import (
    CLUBEstimator,
    CrossCPC,
    CrossModalCodeMatchingLoss,
    CrossModalCommitmentLoss,
    MultiModalEMAQuantizer,
)

from .encoders import Decoder, SemanticEncoder, SpecificEncoder

PARTS = ("club", "cpc", "mm-ema", "reset", "matching")


@dataclass(frozen=True)
class ModelConfig:
    shapes: Mapping[str, tuple[int, int]]  # P, C
    segments: int
    dim: int = 128
    codebook_size: int = 128
    specific_dim: int = 64
    length: float = 11.3
    decay: float = 0.98
    reset_after: int = 20
    temperature: float = 0.1
    dropout: float = 0.3
    inner: float = 0.3
    blend: float = 1.0
    beta: float = 0.25
    cross_ratio: float = 0.5
    num_steps: int = 1
    first_step: int = 0
    cells: bool = False
    weights: Mapping[str, float] = field(default_factory=dict)
    without: tuple[str, ...] = ()


class UniCode(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.config = c
        names = tuple(c.shapes)
        self.semantic = nn.ModuleDict(
            {m: SemanticEncoder(C, c.segments, c.dim, length=c.length, dropout=c.dropout, inner=c.inner, blend=c.blend) for m, (_, C) in c.shapes.items()}
        )
        self.specific = nn.ModuleDict(
            {m: SpecificEncoder(C, P, c.specific_dim) for m, (P, C) in c.shapes.items()}
        )
        self.decoder = nn.ModuleDict(
            {m: Decoder(c.dim + c.specific_dim, P, C) for m, (P, C) in c.shapes.items()}
        )
        mm = "mm-ema" not in c.without
        self.quantizer = MultiModalEMAQuantizer(
            c.dim,
            c.codebook_size,
            names,
            decay=c.decay,
            partner="attention" if mm else "none",
            reset_after=None if "reset" in c.without else c.reset_after,
            commitment=CrossModalCommitmentLoss(beta=c.beta, cross_ratio=c.cross_ratio if mm else 0.0, reduction="mean"),
        )
        self.cpc = CrossCPC(
            c.dim, names, num_steps=c.num_steps, first_step=c.first_step, normalize_over="both",
            temperature=c.temperature, normalize=True,
        )
        self.club = nn.ModuleDict(
            {m: CLUBEstimator(c.dim, c.specific_dim, 64) for m in names}
        )
        self.matching = CrossModalCodeMatchingLoss()

    def encode(self, x):
        return {m: self.semantic[m](v) for m, v in x.items()}

    def losses(self, x, quantize):
        c = self.config
        z = self.encode(x)
        rest = {m: self.specific[m](v) for m, v in x.items()}
        q, indices, commit = self.quantizer(z) if quantize else (z, {}, torch.zeros(()))
        out = {}
        out["recon"] = sum((self.decoder[m](q[m], rest[m]) - v).square().mean()/v.square().mean() for m, v in x.items())/len(x)
        if "cpc" not in c.without:
            out["cpc"] = self.cpc(z, start="all").loss
        if quantize:
            out["commit"] = commit
            if "matching" not in c.without:
                k = self.config.length
                out["matching"] = self.matching({m: v.flatten(0, 1)[:, None] for m, v in z.items()} if c.cells else z, self.quantizer.codebook)
        if "club" not in c.without:
            out["club"] = sum(self.club[m](z[m], rest[m]) for m in x)/len(x)
        self.last = (z, rest, indices)
        return out

    def club_loss(self):
        z, rest, _ = self.last
        return sum(self.club[m].learning_loss(z[m], rest[m]) for m in z)
