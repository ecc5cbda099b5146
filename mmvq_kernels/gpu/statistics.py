"""Counts and sums for each code (the brackets of Eq. 7) without float atomics.

Rows are sorted by code, stably, so that the rows of a code are one segment. As some codes are used
much more than others, a segment is cut into chunks of `_CHUNK` rows: `chunk_kernel` sums each chunk
and `combine_kernel` the chunks of each code, both in an order that depends on the rows alone. All
groups (modalities) are sorted together; counts are differences of positions in the order.
`scatter_atomic_kernel` is optional: it needs no sort, but the last bits of its sums differ between
runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from mmvq_kernels.gpu import launching
from mmvq_kernels.gpu.launching import cdiv

_CHUNK = 128  # rows: enough to stream, and few enough that one frequent code fills the GPU


@triton.jit
def chunk_kernel(
    values,  # [N, D]
    order,  # int64 [N]: the rows sorted by code
    bounds,  # int64 [L G + 1]: where each (code, group) begins in the order
    first,  # int64 [L + 1]: the first chunk of each code
    owner,  # int64 [P]: the code of each chunk, L where there is no chunk
    partials,  # fp32 [P, D], out
    L,
    G,
    D,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Per program, BLOCK_D columns of one chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    code = tl.load(owner + chunk)
    if code < L:
        start = tl.load(bounds + code * G) + (chunk - tl.load(first + code)) * CHUNK
        end = tl.minimum(start + CHUNK, tl.load(bounds + (code + 1) * G))
        total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        for place in tl.range(start, end, BLOCK_R):
            places = place + tl.arange(0, BLOCK_R)
            rows = tl.load(order + places, mask=places < end, other=0)
            inside = (places < end)[:, None] & (columns < D)[None, :]
            cells = rows[:, None] * D + columns[None, :]
            total += tl.load(values + cells, mask=inside, other=0.0).to(tl.float32)
        tl.store(partials + chunk * D + columns, tl.sum(total, axis=0), mask=columns < D)


@triton.jit
def combine_kernel(
    partials,  # fp32 [P, D]
    first,  # int64 [L + 1]
    sums,  # fp32 [L, D], out
    D,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Per program, BLOCK_D columns of one code; zeros for a code without a row."""
    code = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    end = tl.load(first + code + 1)
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float64)  # there may be very many chunks
    for chunk in tl.range(tl.load(first + code), end, BLOCK_P):
        chunks = chunk + tl.arange(0, BLOCK_P)
        inside = (chunks < end)[:, None] & (columns < D)[None, :]
        cells = chunks[:, None] * D + columns[None, :]
        total += tl.load(partials + cells, mask=inside, other=0.0).to(tl.float64)
    tl.store(sums + code * D + columns, tl.sum(total, axis=0).to(tl.float32), mask=columns < D)


@triton.jit
def scatter_atomic_kernel(
    values,  # [N, D]
    bins,  # int64 [N]: code * G + group, `end` for a row that is left out
    counts,  # int64 [G, L], added to: float32 cannot count beyond 2^24
    sums,  # fp32 [L, D], added to
    N,
    L,
    G,
    D,
    end,  # L * G, computed on the host, where it cannot overflow
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Per program, BLOCK_N rows by BLOCK_D columns."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    place = tl.load(bins + rows, mask=rows < N, other=end)
    kept = place < end
    inside = kept[:, None] & (columns < D)[None, :]
    value = tl.load(values + rows[:, None] * D + columns[None, :], mask=inside, other=0.0)
    into = sums + (place // G)[:, None] * D + columns[None, :]
    tl.atomic_add(into, value.to(tl.float32), mask=inside, sem="relaxed")
    one = tl.full([BLOCK_N], 1, tl.int64)
    cells = place % G * L + place // G
    tl.atomic_add(counts + cells, one, mask=kept & (tl.program_id(1) == 0), sem="relaxed")


def accumulate(
    values: Tensor,
    indices: Tensor,
    num_codes: int,
    groups: Tensor | None,
    num_groups: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Counts fp32 `[G, L]` and sums fp32 `[L, D]`; see `mmvq_kernels.code_statistics`."""
    (N, D), L, G = values.shape, num_codes, num_groups
    values = values.contiguous()
    sums = values.new_empty((L, D), dtype=torch.float32)
    if sums.numel() == 0 or N == 0:
        return sums.new_zeros(G, L), sums.zero_()
    bins = torch.where(indices < 0, L * G, indices * G if groups is None else indices * G + groups)
    block_d = min(128, max(16, triton.next_power_of_2(D)))
    tiles = cdiv(D, block_d)
    if not deterministic:
        counts, sums = bins.new_zeros(G, L), sums.zero_()
        sizes = {"BLOCK_N": 16, "BLOCK_D": block_d, "num_warps": 4}
        grid = (cdiv(N, 16), tiles)
        args = values, bins, counts, sums, N, L, G, D, L * G
        launching.launch(scatter_atomic_kernel, grid, *args, **sizes)
        return counts.to(torch.float32), sums

    narrow = torch.int32 if L * G < 2**31 else torch.int64  # a radix sort needs half the passes
    ranked, order = bins.to(narrow).sort(stable=True)
    edges = torch.arange(L * G + 1, dtype=narrow, device=bins.device)
    bounds = torch.searchsorted(ranked, edges)  # [L G + 1]
    counts = bounds.diff().view(L, G)
    chunks = (counts.sum(1) + (_CHUNK - 1)).div(_CHUNK, rounding_mode="floor")
    first = pad(chunks.cumsum(0), (1, 0))  # [L + 1]
    most = min(L, N) + N // _CHUNK  # the greatest number of chunks, for any indices
    owner = torch.searchsorted(first, torch.arange(most, device=bins.device), right=True) - 1
    partials = sums.new_empty(most, D)
    tensors = values, order, bounds, first, owner, partials
    sizes = {"CHUNK": _CHUNK, "BLOCK_R": 16, "BLOCK_D": block_d, "num_warps": 4}
    launching.launch(chunk_kernel, (most, tiles), *tensors, L, G, D, **sizes)
    sizes = {"BLOCK_P": 4, "BLOCK_D": block_d, "num_warps": 2}
    launching.launch(combine_kernel, (L, tiles), partials, first, sums, D, **sizes)
    return counts.t().to(torch.float32, memory_format=torch.contiguous_format), sums
