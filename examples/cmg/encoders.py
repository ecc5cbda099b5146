"""The networks around the quantizer: semantic and modality-specific encoders, and decoders.

A segment is P cells of C channels: P = 49 for a grid of 7 x 7 cells, P = 1 for a vector.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from mmvq.distributed import Ranks, rank, world_size
from mmvq.functional import WHOLE


class SemanticEncoder(nn.Module):
    """Phi: semantic features z = Phi(x), `[B, T, P, C]` -> `[B, T, D]` (Eq. 1).

    Attention pools the cells of each segment; their mean and maximum enter too. The first half of z
    describes the segment and depends on this segment alone. The second half describes the clip: a
    pre-norm Transformer layer computes it from the first halves of all segments, without positions,
    so that T may vary. No gradient flows back into these, so that the clip is described by what
    other modalities can also know, which reduces overfitting to few clips. The first half has three
    quarters of the squared norm, so that codes differ first in what their segments show.

    Args:
        channels: number of channels C.
        cells: number of cells P.
        dim: feature dimension D, even; also the hidden width of a segment.
        width: hidden width of a cell.
        heads: number of heads of both attentions.
        dropout: dropout rate of the input (one mask for all cells of a segment) and of the layers.
    """

    def __init__(
        self,
        channels: int,
        cells: int,
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
        self.pool = Pool(channels, dim, width, self.drop) if cells > 1 else None
        self.segment = Sequence(nn.Linear(dim, dim // 2), Sphere(dim // 2))
        self.recall = nn.Linear(dim // 2, dim)
        self.context = Context(dim, heads, dropout)
        self.clip = Sequence(nn.Linear(dim, dim // 2), Sphere(dim // 2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode a batch of clips.

        Args:
            x: `[B, T, P, C]`.
            mask: Padding mask, bool `[B, T]`, True = valid. Other segments have no influence.
        """
        x = x * self.drop(torch.ones_like(x[:, :, :1]))
        cells = self.describe(x)  # [B, T, P, W]
        weights = self.attend(cells).softmax(2)  # [B, T, P, H]
        pooled = rearrange(weights.mT @ cells, "b t h w -> b t (h w)")
        raw = (weights.mean(-1)[:, :, None] @ x).squeeze(2)  # [B, T, C]
        hidden = self.skip(raw) + self.drop(self.mix(pooled))  # [B, T, D]
        if self.pool is not None:
            hidden = hidden + self.pool(x)
        segment = self.segment(hidden, mask)  # [B, T, D / 2]
        context = self.context(self.recall(segment.detach()), mask)
        return torch.cat([1.5**0.5 * segment, 0.5**0.5 * self.clip(context, mask)], -1)


class Sequence(nn.Sequential):
    """A sequence of modules, whose last gets the mask too."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply all modules."""
        *first, last = self
        for module in first:
            x = module(x)
        return last(x, mask)


class Pool(nn.Module):
    """A linear map and a small network on the mean and the maximum of the cells.

    Mean and maximum need no weights to be learned, and generalise better from few clips than
    attention. A mean of P cells varies less than one of them: it is scaled up.
    """

    def __init__(self, channels: int, dim: int, width: int, drop: nn.Module) -> None:
        super().__init__()
        self.skip = nn.Linear(2 * channels, dim)
        self.describe = nn.Sequential(nn.Linear(2 * channels, width), nn.GELU())
        self.mix = nn.Linear(width, dim)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, T, P, C]` to `[B, T, D]`."""
        both = torch.cat([3 * x.mean(2), x.amax(2)], -1)
        return self.skip(both) + self.drop(self.mix(self.describe(both)))


class Context(nn.TransformerEncoderLayer):
    """A pre-norm Transformer layer, `[B, T, D]` -> `[B, T, D]`, with the `Dropout` of this file.

    The attention is reimplemented, because torch does not expose its dropout; the result is equal.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        gelu = nn.functional.gelu
        super().__init__(dim, heads, 2 * dim, dropout, gelu, batch_first=True, norm_first=True)
        self.dropout = self.dropout1 = self.dropout2 = Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map `[B, T, D]`; the mask is bool `[B, T]`, True = valid."""
        if mask is None:
            return super().forward(x)
        x = x + self._sa_block(self.norm1(x), mask=mask)
        return x + self._ff_block(self.norm2(x))

    def _sa_block(self, x: Tensor, *_: object, mask: Tensor | None = None, **__: object) -> Tensor:
        inner = self.self_attn
        x = rearrange(x, "b t d -> t b d")
        qkv = nn.functional.linear(x, inner.in_proj_weight, inner.in_proj_bias)
        q, k, v = rearrange(qkv, "t b (n h d) -> n b h t d", n=3, h=inner.num_heads)
        scale = q.shape[-1] ** -0.25
        scores = q * scale @ (k * scale).mT  # [B, heads, T, T]
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
        weights = self.dropout(scores.softmax(-1))
        x = inner.out_proj(rearrange(weights @ v, "b h t d -> t b (h d)"))
        return rearrange(self.dropout1(x, 1), "t b d -> b t d")


class Dropout(nn.Dropout):
    """Dropout whose masks do not depend on the number of ranks.

    Each rank draws the masks of all clips and uses those of its own.
    """

    def forward(self, x: Tensor, dim: int = 0) -> Tensor:
        """Drop elements of x, whose batch dimension is `dim`."""
        if not self.training:
            return x
        shape = list(x.shape)
        shape[dim] *= world_size()
        drawn = super().forward(x.new_ones(shape))
        return x * drawn.narrow(dim, rank() * x.shape[dim], x.shape[dim])


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation over the valid rows of all ranks, on any device."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise `[N, D]`; mask is bool `[N]`. All ranks have the same N."""
        if not self.training or (mask is None and world_size() == 1):
            return super().forward(x)
        ranks = WHOLE if world_size() == 1 else Ranks([len(x)] * world_size())
        valid = x.new_ones(len(x), 1) if mask is None else mask[:, None].to(x)
        total, count = ranks.sum((x * valid).sum(0), valid.sum())
        count = count.clamp(min=1)
        x = x - total / count
        (squares,) = ranks.sum((x * valid).square().sum(0))
        with torch.no_grad():
            known = count > 1  # otherwise there is no variance
            self.running_mean.lerp_(total / count, self.momentum * known)
            self.running_var.lerp_(squares / (count - 1).clamp(min=1), self.momentum * known)
            self.num_batches_tracked += known
        return x * (squares / count + self.eps).rsqrt() * self.weight + self.bias


class Sphere(nn.Module):
    """Batch normalisation, then scaling to length sqrt(D), so that elements are about 1 in size.

    Args:
        dim: feature dimension D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.spread = BatchNorm(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map `[B, T, D]` to `[B, T, D]`, at least float32; mask is bool `[B, T]`."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        flat = rearrange(x, "b t d -> (b t) d")
        x = self.spread(flat, None if mask is None else mask.flatten()).view_as(x)
        return nn.functional.normalize(x, dim=-1) * x.shape[-1] ** 0.5


class SpecificEncoder(nn.Module):
    """Psi: modality-specific features, `[B, T, P, C]` -> `[B, T, S]` (Eq. 1)."""

    def __init__(self, channels: int, cells: int, width: int) -> None:
        super().__init__()
        per_cell = _cell_width(cells)
        self.reduce = nn.Sequential(nn.Linear(channels, per_cell), nn.GELU())
        self.gather = nn.Linear(cells * per_cell, width)

    def forward(self, x: Tensor) -> Tensor:
        """Encode a batch of clips."""
        return self.gather(rearrange(self.reduce(x), "b t p c -> b t (p c)"))


class Decoder(nn.Module):
    """D: the input from both features, `[B, T, D]` and `[B, T, S]` -> `[B, T, P, C]` (Eq. 3)."""

    def __init__(self, width: int, cells: int, channels: int) -> None:
        super().__init__()
        hidden, per_cell = 128, _cell_width(cells)
        self.cells = cells
        self.scatter = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, cells * per_cell), nn.GELU()
        )
        self.expand = nn.Linear(per_cell, channels)

    def forward(self, semantic: Tensor, specific: Tensor) -> Tensor:
        """Decode a batch of clips."""
        h = self.scatter(torch.cat([semantic, specific], -1))
        return self.expand(rearrange(h, "b t (p c) -> b t p c", p=self.cells))


def _cell_width(cells: int) -> int:
    """Hidden width of a cell in the specific encoder and the decoder."""
    return 128 if cells == 1 else 16
