"""The networks around the quantizer: what is shared (Phi), what is not (Psi), and back to data.

A segment of any modality is P cells of C channels: P = 49 for a 7 x 7 grid, 1 for a flat vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SemanticEncoder(nn.Module):
    """Phi: what the modalities could share, z = Phi(x), `[B, T, P, C]` -> `[B, T, D]` (Eq. 1).

    Every cell is described, attention picks the cells that matter, a pre-norm Transformer layer with
    learned positions adds the clip around the segment. Batch normalisation and a fixed length keep
    the features of all modalities spread over one sphere.

    Args:
        channels: C.
        segments: T.
        dim: D, also the width inside.
        heads: of both attentions.
        dropout: on the input, and inside.
        length: of every z.
    """

    def __init__(
        self,
        channels: int,
        segments: int,
        dim: int,
        *,
        width: int = 64,
        heads: int = 4,
        dropout: float = 0.3,
        inner: float = 0.3,
        blend: float = 1.0,
        length: float = 1.0,
    ) -> None:
        super().__init__()
        self.length = length
        self.drop = nn.Dropout(dropout)
        self.drop2 = nn.Dropout(inner)
        self.blend = blend
        self.describe = nn.Sequential(nn.Linear(channels, width), nn.GELU())
        self.attend = nn.Linear(width, heads)
        self.mix = nn.Linear(heads * width, dim)
        self.skip = nn.Linear(channels, dim)
        self.position = nn.Parameter(torch.zeros(segments, dim))
        self.context = nn.TransformerEncoderLayer(
            dim, heads, 2 * dim, inner, nn.functional.gelu, batch_first=True, norm_first=True
        )
        self.spread = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Encode a batch of clips."""
        x = x * self.drop(torch.ones_like(x[:, :, :1]))  # one mask for all cells of a segment
        cells = self.describe(x)  # [B, T, P, D]
        weights = self.attend(cells).softmax(2)  # [B, T, P, heads]
        picked = torch.einsum("btph,btpd->bthd", weights, cells).flatten(2)
        seen = torch.einsum("btp,btpc->btc", weights.mean(-1), x)
        h = self.skip(seen) + self.drop2(self.mix(picked))  # [B, T, D]
        h = h + self.blend * (self.context(h + self.position) - h)
        h = self.spread(h.flatten(0, 1)).view_as(h)
        return self.length * nn.functional.normalize(h, dim=-1)


class SpecificEncoder(nn.Module):
    """Psi: the rest of a modality, `[B, T, P, C]` -> `[B, T, S]` (Eq. 1)."""

    def __init__(self, channels: int, cells: int, width: int, *, hidden: int = 128) -> None:
        super().__init__()
        per_cell = hidden if cells == 1 else 16
        self.reduce = nn.Sequential(nn.Linear(channels, per_cell), nn.GELU())
        self.gather = nn.Linear(cells * per_cell, width)

    def forward(self, x: Tensor) -> Tensor:
        """Encode a batch of clips."""
        return self.gather(self.reduce(x).flatten(2))


class Decoder(nn.Module):
    """D: both parts back to the features, `[B, T, D + S]` -> `[B, T, P, C]` (Eq. 3)."""

    def __init__(self, width: int, cells: int, channels: int, *, hidden: int = 128) -> None:
        super().__init__()
        per_cell = hidden if cells == 1 else 16
        self.cells = cells
        self.scatter = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, cells * per_cell), nn.GELU()
        )
        self.expand = nn.Linear(per_cell, channels)

    def forward(self, semantic: Tensor, specific: Tensor) -> Tensor:
        """Decode a batch of clips."""
        h = self.scatter(torch.cat([semantic, specific], -1))
        return self.expand(h.unflatten(-1, (self.cells, -1)))
