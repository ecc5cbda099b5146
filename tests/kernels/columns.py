"""The products of the search alone, so that `test_gpu.py` can compare their bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from mmvq_kernels.gpu.nearest import _product, padded


@triton.jit
def columns_kernel(
    high, low, x_high, x_low, out, L, P,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Products of BLOCK_N vectors and all codes in float16 parts, as in `search_kernel`."""
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    for start in tl.range(0, L, BLOCK_L):
        codes = start + tl.arange(0, BLOCK_L)
        total = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
        for column in tl.range(0, P, BLOCK_D):
            x_cells = rows[:, None] * P + column + columns[None, :]
            high_part, low_part = tl.load(x_high + x_cells), None
            if low is not None:
                low_part = tl.load(x_low + x_cells)
            cells = codes[None, :] * P + column + columns[:, None]
            total += _product(high, low, high_part, low_part, cells)
        tl.store(out + rows[:, None] * L + codes[None, :], total)


def products(x: Tensor, codes: Tensor, fast: bool, tile: int) -> Tensor:
    """All products of 128 vectors with codes below 1, `[128, L]`; L is a multiple of the tile."""
    P, L = padded(x.shape[1]), len(codes)

    def cut(v: Tensor) -> tuple[Tensor, Tensor | None]:
        v = pad(v, (0, P - v.shape[1])) * 2**14
        return v.half(), None if fast else (v - v.half()).half()

    (x_high, x_low), (high, low) = cut(x), cut(codes)
    out = x.new_full((len(x), L), torch.nan)
    blocks = {"BLOCK_N": len(x), "BLOCK_L": tile, "BLOCK_D": min(P, 64)}
    columns_kernel[(1,)](high, low, x_high, x_low, out, L, P, **blocks, num_warps=8, num_stages=2)
    return out * 2.0**-28
