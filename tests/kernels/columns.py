"""The products of the search alone, so that `test_gpu.py` can compare their bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def columns_kernel(
    x, high, low, out, L, D,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`x . e` of BLOCK_N vectors and all codes, whose two tf32 parts are `high` and `low`."""
    rows = tl.arange(0, BLOCK_N)
    for start in tl.range(0, L, BLOCK_L):
        candidates = start + tl.arange(0, BLOCK_L)
        products = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
        for column in tl.range(0, D, BLOCK_D):
            columns = column + tl.arange(0, BLOCK_D)
            inside = columns < D
            v = tl.load(x + rows[:, None] * D + columns[None, :], mask=inside[None, :], other=0.0)
            cells = candidates[None, :] * D + columns[:, None]
            there = (candidates < L)[None, :] & inside[:, None]
            codes = tl.load(high + cells, mask=there, other=0.0)
            if PRECISION == "bf16":
                products = tl.dot(v.to(tl.bfloat16), codes, products)
            elif PRECISION == "tf32x3":
                rest = tl.load(low + cells, mask=there, other=0.0)
                big = (v.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
                big = big.to(tl.float32, bitcast=True)
                part = tl.dot(v - big, codes, input_precision="tf32")
                part = tl.dot(big, rest, part, input_precision="tf32")
                products += tl.dot(big, codes, part, input_precision="tf32")
            else:
                products = tl.dot(v, codes, products, input_precision="tf32")
        cells = rows[:, None] * L + candidates[None, :]
        tl.store(out + cells, products, mask=(candidates < L)[None, :])


def products(x: Tensor, codes: Tensor, precision: str, tile: int) -> Tensor:
    """All products of 128 vectors with codes, `[128, L]`."""
    high = ((codes.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    low = codes - high
    if precision == "bf16":
        high = codes.bfloat16()
    (N, D), L = x.shape, len(codes)
    out = x.new_full((N, L), torch.nan)
    sizes = {"BLOCK_N": N, "BLOCK_L": tile, "BLOCK_D": 16 if D == 16 else 32}
    columns_kernel[(1,)](
        x, high, low, out, L, D, **sizes, PRECISION=precision, num_warps=8, num_stages=3
    )
    return out
