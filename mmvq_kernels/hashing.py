"""Stateless hashing: the same numbers on every device, rank and run, with no generator to keep."""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # odd, 64 bits


def mix(keys: Tensor) -> Tensor:
    """Scramble int64 keys (the finaliser of splitmix64, Steele et al. 2014, on signed integers)."""
    keys = keys * _MULTIPLIERS[0]
    keys = (keys ^ (keys >> 30)) * _MULTIPLIERS[1]
    keys = (keys ^ (keys >> 27)) * _MULTIPLIERS[2]
    return keys ^ (keys >> 31)


def repeats_an_earlier_row(rows: Tensor) -> Tensor:
    """Bool `[L]`: whether a row of `[L, D]` has the same values as one above it."""
    integer = torch.int32 if rows.element_size() == 4 else torch.int64
    bits = (rows + 0.0).view(integer)  # + 0.0: one zero, not two
    weights = mix(torch.arange(1, rows.shape[1] + 1, device=rows.device))  # [D]
    keys, order = (bits * weights).sum(1).sort(stable=True)
    repeated = torch.zeros_like(order, dtype=torch.bool)
    repeated[order[1:]] = keys[1:] == keys[:-1]
    return repeated
