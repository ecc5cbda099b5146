"""Counts and sums for each code (the brackets of Eq. 7) without float atomics.

Of few rows every code finds its own: `gather_kernel` reads all indices once for each code, after
`key_kernel` has made them short if that is much to read. Many rows are sorted by (code, group),
stably. As some codes are used much more than others, the rows of a code
are cut into chunks of `_CHUNK`: `bounds_kernel` counts rows and chunks, `chunk_kernel` sums each
chunk, and `combine_kernel` the chunks of each code. Each sum has an order that depends on the rows
alone. `scatter_atomic_kernel` is optional: it needs no sort, but the last bits of its sums differ
between runs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvq_kernels.gpu import launching
from mmvq_kernels.gpu.launching import cdiv
from mmvq_kernels.statistics import split

_FEW = 8192  # rows; of more, a sort takes less time (measured on an H100 at L 400)
# N times L times blocks of columns: beyond the first, keys of 4 bytes are read in place of an index
# and a group of 16; beyond the second, a sort takes less time too (estimated).
_MANY, _TOO_MANY = 1 << 24, 1 << 27
_CHUNK = 128  # rows: enough to stream, and few enough that one frequent code fills the GPU


@triton.jit
def gather_kernel(
    values,  # [N, D], whatever it holds
    indices,  # int64 [N]: the code, below 0 for a row that is left out; or keys, with KEYS
    groups,  # int64 [N]: below 0 for a row that is left out; None: all 0
    counts,  # fp32 [G, L], out
    sums,  # fp32 [L, D], out
    N,
    L,
    G,
    D,
    KEYS: tl.constexpr,  # whether `indices` are keys, of codes and groups
    GROUPS: tl.constexpr,  # G or more
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Per program, BLOCK_D columns of one code, whose rows are found among all N."""
    code = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    group = tl.arange(0, GROUPS)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    number = tl.zeros([BLOCK_N, GROUPS], tl.int32)
    for start in tl.range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N).to(tl.int64)
        index = tl.load(indices + rows, mask=rows < N, other=-1)
        if KEYS:
            own = index - code * G
            found = (own >= 0) & (own < G)
        else:
            own = tl.zeros([BLOCK_N], tl.int64)
            if groups is not None:
                own = tl.load(groups + rows, mask=rows < N, other=-1)
            found = (index == code) & (own >= 0)
        if tl.max(found.to(tl.int32), axis=0) > 0:
            number += (found[:, None] & (own[:, None] == group[None, :])).to(tl.int32)
            inside = found[:, None] & (columns < D)[None, :]
            cells = rows[:, None] * D + columns[None, :]
            total += tl.load(values + cells, mask=inside, other=0.0).to(tl.float32)
    at = sums + code.to(tl.int64) * D + columns
    tl.store(at, tl.sum(total, axis=0), mask=columns < D)
    at = counts + group.to(tl.int64) * L + code
    number = tl.sum(number, axis=0).to(tl.float32)
    tl.store(at, number, mask=(group < G) & (tl.program_id(1) == 0))


@triton.jit
def key_kernel(
    indices,  # int64 [N]
    groups,  # int64 [N] or None
    keys,  # int32 or int64 [N], out: code * G + group; L * G for a row that is left out
    N,
    L,
    G,
    BLOCK: tl.constexpr,
):
    """Per program, BLOCK rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(indices + rows, mask=rows < N, other=-1)
    keep = key >= 0
    key *= G
    if groups is not None:
        own = tl.load(groups + rows, mask=rows < N, other=-1)
        key += own
        keep = keep & (own >= 0)
    key = tl.where(keep, key, tl.cast(L, tl.int64) * G)
    tl.store(keys + rows, key.to(keys.dtype.element_ty), mask=rows < N)


@triton.jit
def _before(ordered, size, steps, keys):
    """How many of the ascending `ordered` `[size]` are smaller than each key.

    `steps` is the number of bits of the size.
    """
    low = keys * 0
    high = low + size
    for _ in tl.range(0, steps):
        middle = (low + high) // 2
        smaller = tl.load(ordered + middle, mask=middle < size, other=0x7FFFFFFF).to(tl.int64)
        smaller = (smaller < keys) & (low < high)
        low = tl.where(smaller, middle + 1, low)
        high = tl.where(smaller, high, middle)
    return low


@triton.jit
def bounds_kernel(
    ranked,  # int32 or int64 [N]: the keys in order
    counts,  # fp32 [G, L], out
    starts,  # int64 [L + 1], out: where the rows of each code begin
    chunks,  # int64 [L + 1], out: chunks of the codes before each; to be summed up
    N,
    L,
    G,
    steps,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per program, BLOCK codes."""
    codes = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = _before(ranked, N, steps, codes * G)
    edge = first
    for group in tl.range(0, G):
        end = _before(ranked, N, steps, codes * G + group + 1)
        at = counts + tl.cast(group, tl.int64) * L + codes
        tl.store(at, (end - edge).to(tl.float32), mask=codes < L)
        edge = end
    tl.store(starts + codes, first, mask=codes <= L)
    tl.store(chunks + codes + 1, (edge - first + (CHUNK - 1)) // CHUNK, mask=codes < L)
    tl.store(chunks + codes, tl.zeros([BLOCK], tl.int64), mask=codes == 0)


@triton.jit
def chunk_kernel(
    values,  # [N, D]
    order,  # int64 [N]: the rows sorted by key
    starts,  # int64 [L + 1]: where the rows of each code begin
    first,  # int64 [L + 1]: the first chunk of each code
    partials,  # fp32 [P, D], out
    L,
    D,
    steps,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Per program, BLOCK_D columns of one chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if chunk < tl.load(first + L):
        code = _before(first, L + 1, steps, chunk + 1) - 1
        start = tl.load(starts + code) + (chunk - tl.load(first + code)) * CHUNK
        end = tl.minimum(start + CHUNK, tl.load(starts + code + 1))
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
    indices,  # int64 [N]
    groups,  # int64 [N] or None
    counts,  # int64 [G, L], added to: float32 cannot count beyond 2^24
    sums,  # fp32 [L, D], added to
    N,
    L,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Per program, BLOCK_N rows by BLOCK_D columns."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    code = tl.load(indices + rows, mask=rows < N, other=-1)
    own = tl.zeros([BLOCK_N], tl.int64)
    if groups is not None:
        own = tl.load(groups + rows, mask=rows < N, other=-1)
    kept = (code >= 0) & (code < L) & (own >= 0)
    inside = kept[:, None] & (columns < D)[None, :]
    value = tl.load(values + rows[:, None] * D + columns[None, :], mask=inside, other=0.0)
    into = sums + code[:, None] * D + columns[None, :]
    tl.atomic_add(into, value.to(tl.float32), mask=inside, sem="relaxed")
    one = tl.full([BLOCK_N], 1, tl.int64)
    once = kept & (tl.program_id(1) == 0)
    tl.atomic_add(counts + own * L + code, one, mask=once, sem="relaxed")


def accumulate(
    values: Tensor,
    indices: Tensor,
    num_codes: int,
    groups: Tensor | None,
    num_groups: int,
    deterministic: bool,
) -> Tensor:
    """Counts `[G, L]` and sums `[L, D]`, flat in fp32; see `mmvq_kernels.code_statistics`."""
    (N, D), L, G = values.shape, num_codes, num_groups
    values, indices = values.contiguous(), indices.contiguous()
    groups = None if groups is None else groups.contiguous()
    flat = values.new_empty(G * L + L * D, dtype=torch.float32)
    counts, sums = split(flat, G, L, D)
    if N == 0 or sums.numel() == 0:
        return flat.zero_()
    block_d = min(128, max(16, triton.next_power_of_2(D)))
    if not deterministic:
        numbers, grid = indices.new_zeros(G * L), (cdiv(N, 16), cdiv(D, block_d))
        args: tuple[Any, ...] = values, indices, groups, numbers, sums.zero_(), N, L, D
        sizes = {"BLOCK_N": 16, "BLOCK_D": block_d, "num_warps": 4}
        launching.launch(scatter_atomic_kernel, grid, *args, **sizes)
        return torch.cat([numbers.to(torch.float32), sums.flatten()])
    narrow = min(block_d, 64)  # columns of a program that looks for rows
    looks = N * L * cdiv(D, narrow)
    few, short = N <= _FEW and looks <= _TOO_MANY and G <= 32, looks > _MANY
    if short or not few:  # a radix sort of 32 bits needs half the passes
        keys = torch.empty_like(indices, dtype=torch.int32 if L * G < 2**31 else torch.long)
        launching.launch(key_kernel, (cdiv(N, 1024),), indices, groups, keys, N, L, G, BLOCK=1024)
        indices, groups = keys, None
    if few:
        args = values, indices, groups, counts, sums, N, L, G, D
        sizes = {"GROUPS": triton.next_power_of_2(G), "BLOCK_N": 128, "BLOCK_D": narrow}
        grid = (L, cdiv(D, narrow))
        sizes |= {"num_warps": 4, "maxnreg": 255}  # the compiler would take fewer, and spill
        launching.launch(gather_kernel, grid, *args, KEYS=short, **sizes)
        return flat

    ranked, order = indices.sort(stable=True)
    starts, chunks = order.new_empty(2, L + 1).unbind()
    args = ranked, counts, starts, chunks, N, L, G, N.bit_length()
    launching.launch(bounds_kernel, (cdiv(L + 1, 128),), *args, CHUNK=_CHUNK, BLOCK=128)
    first = chunks.cumsum(0)
    most = min(L, N) + N // _CHUNK  # the greatest number of chunks, for any indices
    partials = sums.new_empty(most, D)
    grid = (most, cdiv(D, block_d))
    sizes = {"CHUNK": _CHUNK, "BLOCK_R": 16, "BLOCK_D": block_d, "num_warps": 4}
    args = values, order, starts, first, partials, L, D, (L + 1).bit_length()
    launching.launch(chunk_kernel, grid, *args, **sizes)
    sizes = {"BLOCK_P": 4, "BLOCK_D": block_d, "num_warps": 2}
    launching.launch(combine_kernel, (L, grid[1]), partials, first, sums, D, **sizes)
    return flat
