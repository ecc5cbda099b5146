"""The one place that talks to torch.distributed."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Ranks in the group; 1 when nothing is distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


def all_reduce_(flat: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Sum a buffer over the ranks, in place."""
    if world_size(group) > 1:
        dist.all_reduce(flat, group=group)


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows `[N_k, ...]` of all ranks, in the order of the ranks; N_k may differ."""
    ranks = world_size(group)
    if ranks == 1:
        return rows
    mine = torch.tensor([rows.shape[0]], device=rows.device)
    sizes = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(sizes, mine, group=group)
    longest = max(int(size) for size in sizes)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[: int(n)] for part, n in zip(parts, sizes, strict=True)])
