"""The networks around the quantizer: what is shared (Phi), what is not (Psi), and back to data.

A segment of any modality is P cells of C channels: P = 49 for a 7 x 7 grid, 1 for a flat vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SemanticEncoder(nn.Module):
    """Phi: what the modalities could share, z = Phi(x), `[B, T, P, C]` -> `[B, T, D]` (Eq. 1).

    Every cell is described, and attention picks the cells that matter. One half of z then tells
    what this segment holds, and nothing else reaches it. The other half tells what the clip is
    about: a pre-norm Transformer layer with learned positions reads it from the first halves of
    all segments, without a gradient into them: a clip is known by what other modalities can know
    too, which makes few clips harder to learn by heart.

    Args:
        channels: C.
        segments: T.
        dim: D, even; also the width of a segment inside.
        width: of a cell inside.
        heads: of both attentions.
        dropout: of the input (one mask for all cells of a segment) and inside.
    """

    def __init__(
        self,
        channels: int,
        segments: int,
        dim: int,
        *,
        width: int,
        heads: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.describe = nn.Sequential(nn.Linear(channels, width), nn.GELU())
        self.attend = nn.Linear(width, heads)
        self.mix = nn.Linear(heads * width, dim)
        self.skip = nn.Linear(channels, dim)
        self.segment = nn.Sequential(nn.Linear(dim, dim // 2), Sphere(dim // 2))
        self.recall = nn.Linear(dim // 2, dim)
        self.position = nn.Parameter(torch.zeros(segments, dim))
        self.context = nn.TransformerEncoderLayer(
            dim, heads, 2 * dim, dropout, nn.functional.gelu, batch_first=True, norm_first=True
        )
        self.clip = nn.Sequential(nn.Linear(dim, dim // 2), Sphere(dim // 2))

    def forward(self, x: Tensor) -> Tensor:
        """Encode a batch of clips."""
        x = x * self.drop(torch.ones_like(x[:, :, :1]))
        cells = self.describe(x)  # [B, T, P, W]
        weights = self.attend(cells).softmax(2)  # [B, T, P, H]
        picked = (weights.mT @ cells).flatten(2)  # [B, T, H W]
        seen = (weights.mean(-1)[:, :, None] @ x).squeeze(2)  # [B, T, C]
        segment = self.segment(self.skip(seen) + self.drop(self.mix(picked)))  # [B, T, D / 2]
        context = self.context(self.recall(segment.detach()) + self.position)  # [B, T, D]
        return torch.cat([segment, self.clip(context)], -1)


class Sphere(nn.Module):
    """Batch normalisation, then length sqrt(D): features spread over one sphere, elements about 1.

    Args:
        dim: D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.spread = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, T, D]` to `[B, T, D]`."""
        x = self.spread(x.flatten(0, 1)).view_as(x)
        return nn.functional.normalize(x, dim=-1) * x.shape[-1] ** 0.5


class SpecificEncoder(nn.Module):
    """Psi: the rest of a modality, `[B, T, P, C]` -> `[B, T, S]` (Eq. 1)."""

    def __init__(self, channels: int, cells: int, width: int) -> None:
        super().__init__()
        per_cell = 128 if cells == 1 else 16
        self.reduce = nn.Sequential(nn.Linear(channels, per_cell), nn.GELU())
        self.gather = nn.Linear(cells * per_cell, width)

    def forward(self, x: Tensor) -> Tensor:
        """Encode a batch of clips."""
        return self.gather(self.reduce(x).flatten(2))


class Decoder(nn.Module):
    """D: both parts back to the features, `[B, T, D]` and `[B, T, S]` -> `[B, T, P, C]` (Eq. 3)."""

    def __init__(self, width: int, cells: int, channels: int) -> None:
        super().__init__()
        hidden, per_cell = 128, 128 if cells == 1 else 16
        self.cells = cells
        self.scatter = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, cells * per_cell), nn.GELU()
        )
        self.expand = nn.Linear(per_cell, channels)

    def forward(self, semantic: Tensor, specific: Tensor) -> Tensor:
        """Decode a batch of clips."""
        h = self.scatter(torch.cat([semantic, specific], -1))
        return self.expand(h.unflatten(-1, (self.cells, -1)))
