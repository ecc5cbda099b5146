"""Nearest code (Eq. 2) as one fused search: no `[N, L]` tensor, not even a block of one.

`prepare_kernel` moves codes and vectors to a centre, scales each row by a power of two, so that its
greatest entry is close to 2^15, and cuts it into two float16 parts: `v' s = high + low`, to 2^-22
of an entry or 2^-39 of the greatest. `search_kernel` streams the codes past a block of vectors and
keeps the smallest score `|e'|^2 / 2 - x' . e'` with its index; the product is that of the parts,
without low times low. Where blocks of vectors alone would leave processors idle, the codes are
split over programs, whose results meet in one integer atomic minimum of (score, index) packed into
64 bits: the result does not depend on the order in which they arrive. The last to arrive, by a
ticket, unpacks the indices.

On devices that `filtering` names, it first finds the indices that one product proves.

Equal codes get equal scores to the last bit, because the loop treats every column of a tile alike
and never splits D: so the lowest index wins without a search for repeated codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvq_kernels.gpu import filtering, launching
from mmvq_kernels.gpu.filtering import split_eights
from mmvq_kernels.gpu.launching import cdiv
from mmvq_kernels.gpu.tiles import Tile, plan

_OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4)
_BLOCK = 128  # codes and vectors are padded to a multiple, so that no tile is masked


_DOUBTED = 16  # of so many rows, one is taken to need the search after a filter


@triton.jit
def median(a, b, c):
    """Element by element. One that is not finite never comes out while the others are."""
    return tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))


@triton.jit
def arrives_last(ticket, programs):
    """Whether this program is the last of `programs` to come here: it sees what all have written.

    Stores of all threads come before the barrier, the ticket, a 0 at first, after it.
    """
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1
    tl.debug_barrier()
    return last


@triton.jit
def _centre(codebook, columns, L, D):
    """The median of the first, middle and last code, element by element.

    Where it is not finite, the first finite value among 256 rows stands in for it, or 0.
    """
    inside = columns < D
    middle = codebook + tl.cast(L // 2, tl.int64) * D + columns
    last = codebook + tl.cast(L - 1, tl.int64) * D + columns
    centre = median(
        tl.load(codebook + columns, mask=inside, other=0.0).to(tl.float32),
        tl.load(middle, mask=inside, other=0.0).to(tl.float32),
        tl.load(last, mask=inside, other=0.0).to(tl.float32),
    )
    row = tl.cast(0, tl.int64)
    while (row < tl.minimum(L, 256)) & (tl.max((centre - centre != 0).to(tl.int32), axis=0) > 0):
        other = tl.load(codebook + row * D + columns, mask=inside, other=0.0)
        centre = tl.where(centre - centre != 0, other.to(tl.float32), centre)
        row += 1
    return tl.where(centre - centre != 0, 0.0, centre)


@triton.jit
def _cut(source, codebook, at, rows, L, D, BLOCK_D: tl.constexpr):
    """Rows `at` of `source` about the centre: cut, 1 / s, half their squared norms, which are fit.

    1 / s is a power of two. Of rows that are not there, or not finite, the parts are 0.
    """
    columns = tl.arange(0, BLOCK_D)
    there = (at < rows)[:, None] & (columns < D)[None, :]
    v = tl.load(source + at[:, None] * D + columns[None, :], mask=there, other=0.0).to(tl.float32)
    v = tl.where(there, v - _centre(codebook, columns, L, D)[None, :], 0.0)
    fit = (tl.max((v - v != 0).to(tl.int32), axis=1) == 0) & (at < rows)
    v = tl.where(fit[:, None], v, 0.0)
    half_norm = tl.sum(v * v * 0.5, axis=1)
    exponent = tl.max(tl.abs(v), axis=1).to(tl.int32, bitcast=True) >> 23  # 2^(exponent - 127)
    exponent = tl.maximum(exponent, 15)  # that s, of 268 - exponent, be finite
    scale = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    v *= scale[:, None]
    high = v.to(tl.float16)
    low = (v - high.to(tl.float32)).to(tl.float16)
    inverse = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    return high, low, inverse, half_norm, fit


@triton.jit
def prepare_kernel(
    x,  # [N, D]
    codebook,  # [L, D]
    high,  # fp16 [R + ..., P], out: L codes, from row R on N vectors, all else 0
    low,  # the same, out: what rounding to fp16 left over; None if it is not used
    inverse,  # fp32 [R + ...], out: 2^14 / s of a code, 1 / s of a vector, NaN if it is not finite
    half_norm,  # fp32 [R], out; inf if the code is not finite, or past L
    norms,  # fp32 [R + ..., 2], out: |high| / s, |low| / s, NaN as 1 / s; None if not used
    packed,  # int64 [N], out: the greatest value; None if the codes are not split
    tickets,  # int32 [K], out: zeros; None if there are none
    N,
    K,
    L,
    R,
    D,
    P,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,  # at least P
):
    """Per program, BLOCK_R codes, or as many vectors."""
    to = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.program_id(0).to(tl.int64) * BLOCK_R < R:
        big, rest, r, half, fit = _cut(codebook, codebook, to, L, L, D, BLOCK_D)
        tl.store(half_norm + to, tl.where(fit, half, float("inf")))
    else:
        big, rest, r, half, fit = _cut(x, codebook, to - R, N, L, D, BLOCK_D)
        r = tl.where(fit, r, float("nan"))
    columns = tl.arange(0, BLOCK_D)
    cells, inside = to[:, None] * P + columns[None, :], (columns < P)[None, :]
    tl.store(high + cells, big, mask=inside)
    if low is not None:
        tl.store(low + cells, rest, mask=inside)
    tl.store(inverse + to, tl.where(to < R, r * 16384.0, r))
    if norms is not None:
        big, rest = big.to(tl.float32), rest.to(tl.float32)
        tl.store(norms + 2 * to, tl.sqrt(tl.sum(big * big, axis=1)) * r)
        tl.store(norms + 2 * to + 1, tl.sqrt(tl.sum(rest * rest, axis=1)) * r)
    begin = tl.program_id(0).to(tl.int64) * BLOCK_N
    step = tl.cast(tl.num_programs(0), tl.int64) * BLOCK_N
    if packed is not None:
        for start in tl.range(begin, N, step):
            at = start + tl.arange(0, BLOCK_N)
            tl.store(packed + at, tl.full([BLOCK_N], 0x7FFFFFFFFFFFFFFF, tl.int64), mask=at < N)
    if tickets is not None:
        for start in tl.range(begin, K, step):
            at = start + tl.arange(0, BLOCK_N)
            tl.store(tickets + at, tl.zeros([BLOCK_N], tl.int32), mask=at < K)


@triton.jit
def _product(high, low, x_high, x_low, cells):
    """A block of vectors times codes, at `cells`, read transposed."""
    e_high = tl.load(high + cells)
    if low is None:
        products = tl.dot(x_high, e_high)
    else:
        products = tl.dot(x_low, e_high)
        products = tl.dot(x_high, tl.load(low + cells), products)
        products = tl.dot(x_high, e_high, products)
    return products


@triton.jit
def _keep_least(
    best, index, products, factor, inverse, half_norm, start,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """`best` and `index` after one more tile, of the codes from `start` on.

    Column c of the 8 has the smallest score of the columns c, c + 8, ... of all tiles, and where:
    c below the index of the code. So no value leaves the thread that it is in. Of equal scores the
    first stays; a NaN never does.
    """
    codes = start + tl.arange(0, BLOCK_L)
    # a product is at most 2^30 P; in this order it is neither too small nor too large in between
    products = products * factor[:, None]
    least = products * tl.load(inverse + codes)[None, :] + tl.load(half_norm + codes)[None, :]
    at = tl.broadcast_to((tl.arange(0, BLOCK_L) & -8)[None, :], [BLOCK_N, BLOCK_L])
    for i in tl.static_range(4, 12):  # neighbours, so that what is on the left has lower indices
        if BLOCK_L >> i > 0:
            first, second = split_eights(least, BLOCK_N, BLOCK_L >> i)
            here, there = split_eights(at, BLOCK_N, BLOCK_L >> i)
            least = tl.minimum(first, second)
            at = tl.where(least == first, here, there)
    least, at = tl.reshape(least, [BLOCK_N, 8]), tl.reshape(at, [BLOCK_N, 8])
    less = least < best
    return tl.where(less, least, best), tl.where(less, start + at, index)


@triton.jit
def search_kernel(
    high,  # fp16 [R + ..., P], from prepare_kernel, as all that follows
    low,  # the same, or None
    inverse,  # fp32 [R + ...]
    half_norm,  # fp32 [R]
    packed,  # int64 [N]: (score, index), to be made smaller; None if the codes are not split
    tickets,  # int32 [blocks of vectors]: zeros; None: nobody unpacks
    listed,  # int32 [N]: from filter_kernel, the rows to search; None: all
    counters,  # int32: how many they are
    out,  # int64 [N]: the index
    N,
    L,
    R,
    P,  # a multiple of BLOCK_D
    codes_per_program,  # a multiple of BLOCK_L
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONCE: tl.constexpr,  # P is BLOCK_D: vectors are read once
    PRECISION: tl.constexpr,  # "fp16": for the audit
):
    """Per program, BLOCK_N vectors against `codes_per_program` codes."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = rows < N
    first = tl.program_id(1) * codes_per_program
    last = tl.minimum(first + codes_per_program, L)
    if listed is not None:
        number = tl.load(counters)
        there = rows < number
        rows = tl.load(listed + rows, mask=there, other=0).to(tl.int64)
        last = tl.where(tl.program_id(0).to(tl.int64) * BLOCK_N < number, last, first)
    columns = tl.arange(0, BLOCK_D)
    factor = tl.load(inverse + R + rows) * -(2.0**-14)
    x_cells = (R + rows)[:, None] * P + columns[None, :]
    best = tl.full([BLOCK_N, 8], float("inf"), tl.float32)
    index = tl.zeros([BLOCK_N, 8], tl.int32)
    if ONCE:
        x_high = tl.load(high + x_cells)
        x_low = x_high
        if low is not None:
            x_low = tl.load(low + x_cells)
        for start in tl.range(first, last, BLOCK_L):
            cells = (start + tl.arange(0, BLOCK_L)).to(tl.int64)[None, :] * P + columns[:, None]
            products = _product(high, low, x_high, x_low, cells)
            best, index = _keep_least(
                best, index, products, factor, inverse, half_norm, start, BLOCK_N, BLOCK_L
            )
    else:  # one loop over tiles and columns, so that loads go on from tile to tile
        start, column = first - BLOCK_L, P - BLOCK_D
        products = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
        for _ in tl.range(0, tl.cdiv(last - first, BLOCK_L) * (P // BLOCK_D)):
            start = tl.where(column == P - BLOCK_D, start + BLOCK_L, start)
            column = tl.where(column == P - BLOCK_D, 0, column + BLOCK_D)
            x_high = tl.load(high + x_cells + column)
            x_low = x_high
            if low is not None:
                x_low = tl.load(low + x_cells + column)
            cells = (start + tl.arange(0, BLOCK_L)).to(tl.int64)[None, :] * P + columns[:, None]
            # each step is summed apart, as tensor cores cut what they add to
            products += _product(high, low, x_high, x_low, cells + column)
            if column == P - BLOCK_D:
                best, index = _keep_least(
                    best, index, products, factor, inverse, half_norm, start, BLOCK_N, BLOCK_L
                )
                products = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
    least = tl.min(best, axis=1)
    index = tl.where(best == least[:, None], index + tl.arange(0, 8)[None, :], 0x7FFFFFFF)
    finite = (least > -float("inf")) & (least < float("inf"))
    index = tl.where(finite, tl.min(index, axis=1), 0).to(tl.int64)
    if packed is None:
        tl.store(out + rows, index, mask=there)
    else:
        bits = tl.where(least == 0, 0.0, least).to(tl.int32, bitcast=True)  # one zero
        ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # ordered as the floats are
        tl.atomic_min(packed + rows, (ordered.to(tl.int64) << 32) | index, there, sem="relaxed")
        if tickets is not None:
            if arrives_last(tickets + tl.program_id(0), tl.num_programs(1)):
                found = tl.load(packed + rows, mask=there, other=0, cache_modifier=".cg")
                tl.store(out + rows, found & 0xFFFFFFFF, mask=there)


def search(x: Tensor, codebook: Tensor, fast: bool = False) -> Tensor:
    """`mmvq_kernels.nearest_code` on a GPU, for dtypes up to float32."""
    return search_with_ticket(x, codebook, fast, 0)[0]


def search_with_ticket(
    x: Tensor,
    codebook: Tensor,
    fast: bool = False,
    spare: int = 1,
    force: tuple[Tile, int] | None = None,
    force_filter: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """The indices, int64 `[N]`, and `spare` zeros, int32, for the kernel that follows.

    `force` is a tile and the codes of a program, `force_filter` the tile of a filter, where a sweep
    times them.
    """
    x, codebook = x.contiguous(), codebook.contiguous()
    N, L = x.shape[0], codebook.shape[0]
    P, capability = padded(x.shape[1]), launching.capability(x)
    hopper, large = capability == 90, capability // 10 in (9, 10, 11)  # in shared memory
    device, sieve = launching.name(x), None
    if not fast:
        sieve = force_filter or filtering.chosen(N, L, P, device)
    searched = cdiv(N, _DOUBTED) if sieve else N
    tile, share = force or plan(searched, L, P, launching.processors(x), device)
    narrow = capability >= 100 or _OLD  # where minima pass through shared memory
    widest = 64 if narrow else 256
    codes = min(tile.codes, widest)
    once, options = P <= (128 if hopper else 64), {}
    if capability >= 100:
        options["maxnreg"] = 255  # the compiler would take fewer, and spill
    elif once and hopper and codes == 128:
        options["maxnreg"] = 128  # two programs fit
    blocks, split = cdiv(N, tile.rows), share < L
    out = x.new_empty(N, dtype=torch.long)
    packed = torch.empty_like(out) if split else None
    unpacks = split and launching.amd(x) is None  # whose barriers wait for no atomic of other waves
    own = blocks if unpacks else 0
    begin = 4 if sieve else 0  # two counters, and what follows is aligned
    tickets = x.new_empty(begin + own + spare, dtype=torch.int32)
    norms, listed = None, None
    if sieve:
        norms = x.new_empty(padded_rows(L) + padded_rows(N), 2, dtype=torch.float32)
    prepared = prepare(x, codebook, fast, packed, tickets if len(tickets) else None, norms)
    if sieve and norms is not None:
        found = out if packed is None or unpacks else packed  # where those proven go
        listed = filtering.launch(sieve, widest, prepared, norms, tickets, found, L)
    launching.launch(
        search_kernel,
        (blocks, cdiv(L, share)),
        *(*prepared, packed, tickets.narrow(0, begin, own) if unpacks else None),
        *(listed, tickets if sieve else None, out),
        *(N, L, len(prepared[-1]), P, share),
        BLOCK_N=tile.rows,
        BLOCK_L=codes,
        BLOCK_D=P if once else 64 if large else 32,
        ONCE=once,
        PRECISION="fp16",
        num_warps=tile.warps,
        num_stages=tile.stages if hopper else 2 if large else 3,
        **options,
    )
    if packed is not None and not unpacks:
        out = packed.bitwise_and_(0xFFFFFFFF)
    return out, tickets.narrow(0, begin + own, spare)


def padded(D: int) -> int:
    """Columns of what `search_kernel` reads: a power of two from 16 to 64, or a multiple of 64."""
    return max(16, triton.next_power_of_2(D)) if D <= 64 else 64 * cdiv(D, 64)


def padded_rows(N: int) -> int:
    """A multiple of the rows of each tile."""
    return _BLOCK * cdiv(N, _BLOCK)


def prepare(
    x: Tensor,
    codebook: Tensor,
    fast: bool = False,
    packed: Tensor | None = None,
    tickets: Tensor | None = None,
    norms: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """What `search_kernel` reads: high, low, 1 / s, half-norms.

    `packed` and `tickets` are made ready for it, `norms` for `filtering`.
    """
    (N, D), L = x.shape, codebook.shape[0]
    P, R, rows = padded(D), padded_rows(L), padded_rows(N)
    parts = x.new_empty(1 if fast else 2, R + rows, P, dtype=torch.float16).unbind()
    inverse = x.new_empty(R + rows, dtype=torch.float32)
    half_norm = x.new_empty(R, dtype=torch.float32)
    high, low = (parts[0], None) if fast else parts
    block_d = triton.next_power_of_2(P)
    block_r = max(1, min(64, 2048 // block_d))
    launching.launch(
        prepare_kernel,
        ((R + rows) // block_r,),
        *(x, codebook, high, low, inverse, half_norm, norms, packed, tickets),
        *(N, 0 if tickets is None else len(tickets), L, R, D, P),
        BLOCK_N=1024,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=4,
        maxnreg=128,  # the compiler would take fewer, and spill
    )
    return high, low, inverse, half_norm
