"""The networks around the quantizer: what is shared (Phi), what is not (Psi), and back to data.

A segment of any modality is P cells of C channels: P = 49 for a 7 x 7 grid, 1 for a flat vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmvq.distributed import Ranks, rank, world_size


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
        self.drop = Dropout(dropout)
        self.describe = nn.Sequential(nn.Linear(channels, width), nn.GELU())
        self.attend = nn.Linear(width, heads)
        self.mix = nn.Linear(heads * width, dim)
        self.skip = nn.Linear(channels, dim)
        self.segment = nn.Sequential(nn.Linear(dim, dim // 2), Sphere(dim // 2))
        self.recall = nn.Linear(dim // 2, dim)
        self.position = nn.Parameter(torch.zeros(segments, dim))
        self.context = Context(dim, heads, dropout)
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


class Context(nn.TransformerEncoderLayer):
    """A pre-norm Transformer layer, `[B, T, D]` -> `[B, T, D]`, with the `Dropout` below.

    Only the attention is written anew, as torch hides its dropout; the numbers are torch's.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        gelu = nn.functional.gelu
        super().__init__(dim, heads, 2 * dim, dropout, gelu, batch_first=True, norm_first=True)
        self.dropout = self.dropout1 = self.dropout2 = Dropout(dropout)

    def _sa_block(self, x: Tensor, *_: object, **__: object) -> Tensor:
        inner = self.self_attn
        x = x.transpose(0, 1)  # [T, B, D]
        heads = nn.functional.linear(x, inner.in_proj_weight, inner.in_proj_bias)
        heads = heads.unflatten(-1, (3, inner.num_heads, -1))
        q, k, v = heads.permute(2, 1, 3, 0, 4)  # [B, H, T, D / H] each
        scale = q.shape[-1] ** -0.25
        weights = self.dropout((q * scale @ (k * scale).mT).softmax(-1))
        x = inner.out_proj((weights @ v).permute(2, 0, 1, 3).flatten(2))  # [T, B, D]
        return self.dropout1(x, 1).transpose(0, 1)


class Dropout(nn.Dropout):
    """Drawn for the clips of all ranks, each of which keeps its own: any number trains alike."""

    def forward(self, x: Tensor, dim: int = 0) -> Tensor:
        """Drop elements of x, whose clips lie along `dim`."""
        if not self.training:
            return x
        shape = list(x.shape)
        shape[dim] *= world_size()
        drawn = super().forward(x.new_ones(shape))
        return x * drawn.narrow(dim, rank() * x.shape[dim], x.shape[dim])


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation over the rows of all ranks, of which each has as many; on any device."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[N, D]`."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        ranks = Ranks([len(x)] * world_size())
        rows = sum(ranks.sizes)
        (total,) = ranks.sum(x.sum(0))
        x = x - total / rows
        (squares,) = ranks.sum(x.square().sum(0))
        with torch.no_grad():
            self.running_mean.lerp_(total / rows, self.momentum)
            self.running_var.lerp_(squares / (rows - 1), self.momentum)
            self.num_batches_tracked += 1
        return x * (squares / rows + self.eps).rsqrt() * self.weight + self.bias


class Sphere(nn.Module):
    """Batch normalisation, then length sqrt(D): features spread over one sphere, elements about 1.

    Args:
        dim: D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.spread = BatchNorm(dim)

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
