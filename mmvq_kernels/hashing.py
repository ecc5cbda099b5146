"""Hashing in place of a random generator: the same on every device, rank and run."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = (  # an odd multiplier of 64 bits, a shift
    (-0x61C8864680B583EB, 30),
    (-0x40A7B892E31B1A47, 27),
    (-0x6B2FB644ECCEEE15, 31),
)
_BLOCK = 1 << 16  # words hashed at a time, for the cache


def mix(keys: Tensor) -> Tensor:
    """Scramble int64 keys, one to one (splitmix64, Steele et al. 2014, on signed integers)."""
    keys = keys ^ 0  # a copy; to inductor no longer an index, whose product would overflow
    for multiplier, shift in _ROUNDS:
        keys.mul_(multiplier)
        logical = (1 << (64 - shift)) - 1  # `>>` copies the sign bit; a one-to-one map needs zeros
        keys.bitwise_xor_((keys >> shift).bitwise_and_(logical))
    return keys


def first_equal_row(rows: Tensor) -> Tensor:
    """Of each row of `[L, D]` (float32 or float64) the lowest index of an equal row: int64 `[L]`.

    A row is the sum of its 32-bit words, each times its own odd number, modulo 2^64: rows that
    differ in one word never collide, others as rarely as random keys.
    """
    words = rows.shape[1] * rows.element_size() // 4
    factors = mix(torch.arange(1, words + 1, device=rows.device)).bitwise_or_(1)
    keys = torch.empty_like(rows[:, 0], dtype=torch.long)
    length = max(1, _BLOCK // words) if rows.device.type == "cpu" else len(rows)
    for block, out in zip(rows.split(length), keys.split(length), strict=True):
        bits = (block + 0.0).contiguous().view(torch.int32)  # + 0.0: one zero, not two
        # One to one, and no two words differ in their high bits alone; `>>` copies the sign bit.
        bits = (bits >> 16).bitwise_and_(0xFFFF).bitwise_xor_(bits)
        out.copy_((bits * factors).sum(1))
    keys, order = keys.sort(stable=True)
    place = torch.arange(len(order), device=rows.device)
    place[1:].mul_(keys.diff() != 0)  # 0 where a key comes again
    return torch.empty_like(order).scatter_(0, order, order[place.cummax(0).values])
