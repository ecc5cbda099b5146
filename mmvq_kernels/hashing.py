"""Stateless hashing: the same numbers on every device, rank and run, with no generator to keep."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = (  # an odd multiplier of 64 bits, a shift
    (-0x61C8864680B583EB, 30),
    (-0x40A7B892E31B1A47, 27),
    (-0x6B2FB644ECCEEE15, 31),
)


def mix(keys: Tensor) -> Tensor:
    """Scramble int64 keys, one to one (splitmix64, Steele et al. 2014, on signed integers)."""
    keys = keys.clone()
    for multiplier, shift in _ROUNDS:
        keys.mul_(multiplier)
        logical = (1 << (64 - shift)) - 1  # `>>` copies the sign bit; a one-to-one map needs zeros
        keys.bitwise_xor_((keys >> shift).bitwise_and_(logical))
    return keys


def repeats_an_earlier_row(rows: Tensor) -> Tensor:
    """Bool `[L]`: whether a row of `[L, D]` has the same values as one above it."""
    integer = torch.int32 if rows.element_size() == 4 else torch.int64
    bits = (rows + 0.0).view(integer)  # + 0.0: one zero, not two
    places = mix(torch.arange(1, rows.shape[1] + 1, device=rows.device))  # [D]
    return repeats_an_earlier_key(mix(bits + places).sum(1))


def repeats_an_earlier_key(keys: Tensor) -> Tensor:
    """Bool `[L]`: whether an int64 key of `[L]` equals one before it."""
    keys, order = keys.sort(stable=True)
    repeated = torch.zeros_like(order, dtype=torch.bool)
    return repeated.scatter_(0, order.narrow(0, 1, len(order) - 1), keys.diff() == 0)
