"""Inputs that tests of the torch paths and of the Triton kernels share."""

from __future__ import annotations

import torch
from support import uniform
from torch import Tensor

G = 3  # groups of rows
State = tuple[Tensor, Tensor, Tensor]


def assignments(
    N: int, L: int, D: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, indices from -1 and groups. Use is skewed: half of the rows choose code 0."""
    generator = torch.Generator().manual_seed(N)
    indices = torch.randint(-1, L, (N,), generator=generator)
    indices = torch.where(torch.rand(N, generator=generator) < 0.5, 0, indices)
    groups = torch.randint(G, (N,), generator=generator)
    return uniform(N, D, dtype=dtype).to(device), indices.to(device), groups.to(device)


def average(L: int, D: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> State:
    """Codes, sums below 10 and counts of at least 0.5."""
    counts = (uniform(L, seed=1).abs() * 5 + 0.5).to(device, dtype)
    sums = 10 * uniform(L, D, dtype=dtype).to(device)
    return sums / counts[:, None], sums, counts


def batch(
    L: int, D: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Sums and counts of a step, in which nothing chose code 0."""
    counts = torch.arange(L).remainder(7).to(device, dtype)
    return uniform(L, D, dtype=dtype, seed=3).to(device) * counts[:, None], counts


def faded(state: State, dead: Tensor, mean: float) -> None:
    """Leave the dead codes no sums, and counts of this mean."""
    _, sums, counts = state
    sums[dead] = 0
    counts[dead] = mean * torch.linspace(0.5, 1.5, int(dead.sum())).to(counts)
