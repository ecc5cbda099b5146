"""Nearest code (Eq. 2) as one fused search: no `[N, L]` tensor, not even a block of one.

`prepare_kernel` reads the codebook once and writes what the search needs: the codes about a centre,
cut into tf32 parts, and their half-norms. `search_kernel` streams them past a block of vectors
`x' = x - centre` and keeps the smallest score `|e'|^2 / 2 - x' . e'` with its index. Where blocks
of vectors alone would leave processors idle, the codes are split over programs, whose results meet
in one integer atomic minimum of (score, index) packed into 64 bits: the result does not depend on
the order in which they arrive. The last to arrive, by a ticket, unpacks the indices.

Equal codes get equal scores to the last bit, because the loop treats every column of a tile alike
and never splits D: so the lowest index wins without a search for repeated codes.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from mmvq_kernels.gpu import launching
from mmvq_kernels.gpu.launching import cdiv

_ROWS = 128  # vectors of a program
_TILE_TIMES = {64: 1.0, 128: 1.6}  # by the codes of a tile, as measured on an H100


@triton.jit
def _tf32(x):
    """Float32 rounded to the nearest tf32 number, ties away from zero. Not for NaN: may be 0."""
    return ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)


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
def prepare_kernel(
    codebook,  # [L, D]
    centre,  # fp32 [D], out: the median of the first, middle and last code, element by element
    high,  # fp32 (bf16) [L, D], out: the codes about the centre, rounded to the factors' precision
    low,  # fp32 [L, D], out: what rounding to tf32 left over; None if it is not used
    half_norm,  # fp32 [L], out; inf if the code is not finite
    packed,  # int64 [N], out: the greatest value; None if the codes are not split
    tickets,  # int32 [K], out: zeros; None if there are none
    N,
    K,
    L,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FACTORS: tl.constexpr,  # "tf32" | "bf16": what the codes are rounded to
):
    """Per program, BLOCK_L codes.

    Where the median is not finite, the first finite value among 256 rows stands in for it, or 0.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    products = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    unfit = tl.zeros([BLOCK_L], tl.int32)
    for start in tl.range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = columns < D
        first = tl.load(codebook + columns, mask=inside, other=0.0).to(tl.float32)
        middle = codebook + tl.cast(L // 2, tl.int64) * D + columns
        middle = tl.load(middle, mask=inside, other=0.0).to(tl.float32)
        last = codebook + tl.cast(L - 1, tl.int64) * D + columns
        last = tl.load(last, mask=inside, other=0.0).to(tl.float32)
        c = median(first, middle, last)
        row = tl.cast(0, tl.int64)
        while (row < tl.minimum(L, 256)) & (tl.max((c - c != 0).to(tl.int32), axis=0) > 0):
            other = tl.load(codebook + row * D + columns, mask=inside, other=0.0)
            c = tl.where(c - c != 0, other.to(tl.float32), c)
            row += 1
        c = tl.where(c - c != 0, 0.0, c)
        tl.store(centre + columns, c, mask=inside & (tl.program_id(0) == 0))

        there = (rows < L)[:, None] & inside[None, :]
        cells = rows[:, None] * D + columns[None, :]
        e = tl.load(codebook + cells, mask=there, other=0.0).to(tl.float32)
        unfit += tl.sum((e - e != 0).to(tl.int32), axis=1)
        e = tl.where(there & (e - e == 0), e - c[None, :], 0.0)
        if FACTORS == "bf16":  # x stays as it is: |e'|^2 / 2 + c . e'
            tl.store(high + cells, e.to(tl.bfloat16), mask=there)
            products += e * (e * 0.5 + c[None, :])
        else:
            big = _tf32(e)
            tl.store(high + cells, big, mask=there)
            if low is not None:
                tl.store(low + cells, e - big, mask=there)
            products += e * e * 0.5
    norms = tl.where(unfit == 0, tl.sum(products, axis=1), float("inf"))
    tl.store(half_norm + rows, norms, mask=rows < L)
    if packed is not None:
        for start in tl.range(tl.program_id(0) * BLOCK_N, N, tl.num_programs(0) * BLOCK_N):
            at = start + tl.arange(0, BLOCK_N)
            tl.store(packed + at, tl.full([BLOCK_N], 0x7FFFFFFFFFFFFFFF, tl.int64), mask=at < N)
    if tickets is not None:
        for start in tl.range(tl.program_id(0) * BLOCK_N, K, tl.num_programs(0) * BLOCK_N):
            at = start + tl.arange(0, BLOCK_N)
            tl.store(tickets + at, tl.zeros([BLOCK_N], tl.int32), mask=at < K)


@triton.jit
def search_kernel(
    x,  # [N, D]
    centre,  # fp32 [D]
    high,  # [L, D], from prepare_kernel, as all that follows
    low,  # [L, D] or None
    half_norm,  # fp32 [L], inf for a code that is never to win
    packed,  # int64 [N]: (score, index), to be made smaller; None if the codes are not split
    tickets,  # int32 [blocks of vectors]: zeros; None: nobody unpacks
    out,  # int64 [N]: the index
    N,
    L,
    D,
    codes_per_program,  # a multiple of BLOCK_L
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,  # "tf32x3" ("ieee" on AMD) | "tf32" | "bf16"
    WIDTH: tl.constexpr,  # D where it is small: known in advance, its masks cost no wide loads
):
    """Per program, BLOCK_N vectors against `codes_per_program` codes."""
    if WIDTH > 0:
        D = WIDTH
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * codes_per_program
    best = tl.full([BLOCK_N], float("inf"), tl.float32)
    index = tl.zeros([BLOCK_N], tl.int32)
    for start in tl.range(first, tl.minimum(first + codes_per_program, L), BLOCK_L):
        candidates = start + tl.arange(0, BLOCK_L)
        products = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
        for column in tl.range(0, D, BLOCK_D):
            columns = column + tl.arange(0, BLOCK_D)
            inside = columns < D
            vectors = tl.load(
                x + rows[:, None] * D + columns[None, :],
                mask=(rows < N)[:, None] & inside[None, :],
                other=0.0,
            )
            cells = candidates.to(tl.int64)[None, :] * D + columns[:, None]  # read transposed
            there = (candidates < L)[None, :] & inside[:, None]
            codes = tl.load(high + cells, mask=there, other=0.0)
            if PRECISION == "bf16":
                products = tl.dot(vectors.to(tl.bfloat16), codes, products)
            else:
                c = tl.load(centre + columns, mask=inside, other=0.0)
                vectors = vectors.to(tl.float32) - c[None, :]
                if low is not None:
                    rest = tl.load(low + cells, mask=there, other=0.0)
                if PRECISION == "tf32x3":  # summed apart, as tensor cores cut what they add to
                    big = _tf32(vectors)
                    part = tl.dot(vectors - big, codes, input_precision="tf32")
                    part = tl.dot(big, rest, part, input_precision="tf32")
                    products += tl.dot(big, codes, part, input_precision="tf32")
                elif PRECISION == "tf32":
                    products = tl.dot(vectors, codes, products, input_precision="tf32")
                else:
                    if low is not None:
                        codes += rest
                    products = tl.dot(vectors, codes, products, input_precision="ieee")
        h = tl.load(half_norm + candidates, mask=candidates < L, other=float("inf"))
        scores = h[None, :] - products
        scores = tl.where(scores == scores, scores, -float("inf"))  # NaN, as argmin ranks it
        smallest, place = tl.min(scores, axis=1, return_indices=True)  # the first of equals
        index = tl.where(smallest < best, start + place, index)
        best = tl.minimum(smallest, best)
    finite = (best > -float("inf")) & (best < float("inf"))
    index = tl.where(finite, index, 0).to(tl.int64)
    if packed is None:
        tl.store(out + rows, index, mask=rows < N)
    else:
        bits = tl.where(best == 0, 0.0, best).to(tl.int32, bitcast=True)  # one zero
        ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # ordered as the floats are
        tl.atomic_min(packed + rows, (ordered.to(tl.int64) << 32) | index, rows < N, sem="relaxed")
        if tickets is not None:
            if arrives_last(tickets + tl.program_id(0), tl.num_programs(1)):
                found = tl.load(packed + rows, mask=rows < N, other=0, cache_modifier=".cg")
                tl.store(out + rows, found & 0xFFFFFFFF, mask=rows < N)


def search(x: Tensor, codebook: Tensor, fast: bool = False) -> Tensor:
    """`mmvq_kernels.nearest_code` on a GPU, for dtypes up to float32."""
    return search_with_ticket(x, codebook, fast, 0)[0]


def search_with_ticket(
    x: Tensor, codebook: Tensor, fast: bool = False, spare: int = 1
) -> tuple[Tensor, Tensor]:
    """The indices, int64 `[N]`, and `spare` zeros, int32, for the kernel that follows."""
    if x.shape[1] > 16 and x.shape[1] % 16:  # loads of 16 bytes want a multiple of 16
        x, codebook = (pad(rows, (0, -x.shape[1] % 16)) for rows in (x, codebook))
    x, codebook = x.contiguous(), codebook.contiguous()
    (N, D), L = x.shape, codebook.shape[0]
    precision = "tf32x3"
    if fast and x.dtype == torch.bfloat16:
        precision = "bf16"
    elif fast and launching.amd(x) in (None, "gfx942"):  # others of AMD's multiply no tf32
        precision = "tf32"
    # Converting half precision needs registers. With few columns most work is the minimum.
    widest = 128 if x.element_size() == 4 and D > 16 else 64
    width, share = plan(N, L, launching.processors(x), widest)
    blocks, split = cdiv(N, _ROWS), share < L
    out = x.new_empty(N, dtype=torch.long)
    packed = torch.empty_like(out) if split else None
    unpacks = split and launching.amd(x) is None  # whose barriers wait for no atomic of other waves
    own = blocks if unpacks else 0
    tickets = x.new_empty(own + spare, dtype=torch.int32)
    prepared = prepare(codebook, precision, packed, tickets if len(tickets) else None)
    launching.launch(
        search_kernel,
        (blocks, cdiv(L, share)),
        x,
        *prepared,
        packed,
        tickets if unpacks else None,
        out,
        N,
        L,
        D,
        share,
        BLOCK_N=_ROWS,
        BLOCK_L=width,
        BLOCK_D=16 if D <= 16 else 32,
        PRECISION=precision,
        WIDTH=D if D <= 16 else 0,
        num_warps=8,
        num_stages=3,
    )
    if packed is not None and not unpacks:
        out = packed.bitwise_and_(0xFFFFFFFF)
    return out, tickets.narrow(0, own, spare)


def prepare(
    codebook: Tensor,
    precision: str,
    packed: Tensor | None = None,
    tickets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """What `search_kernel` reads of a codebook: centre, high, low and half-norms.

    `packed` and `tickets` are made ready for it.
    """
    L, D = codebook.shape
    centre = codebook.new_empty(D, dtype=torch.float32)
    high = torch.empty_like(
        codebook, dtype=torch.bfloat16 if precision == "bf16" else torch.float32
    )
    low = torch.empty_like(high) if precision == "tf32x3" else None
    half_norm = codebook.new_empty(L, dtype=torch.float32)
    launching.launch(
        prepare_kernel,
        (cdiv(L, 16),),
        codebook,
        centre,
        high,
        low,
        half_norm,
        packed,
        tickets,
        0 if packed is None else len(packed),
        0 if tickets is None else len(tickets),
        L,
        D,
        BLOCK_N=1024,
        BLOCK_L=16,
        BLOCK_D=min(64, max(16, triton.next_power_of_2(D))),
        FACTORS="bf16" if precision == "bf16" else "tf32",
        num_warps=4,
    )
    return centre, high, low, half_norm


@functools.lru_cache(1 << 10)
def plan(N: int, L: int, processors: int, widest: int = 128) -> tuple[int, int]:
    """The codes of a tile and those of a program, with the least predicted time.

    A processor runs one program at a time, so programs run in waves. A tile of 128 codes takes 1.6
    times as long as one of 64; to begin and end takes a program a quarter as long as one of 64.
    """
    blocks = cdiv(N, _ROWS)

    def time(width: int, share: int) -> float:
        waves = cdiv(blocks * cdiv(L, share), processors)
        return waves * (share / width * _TILE_TIMES[width] + 0.25)

    most = cdiv(16 * processors, max(blocks, 1))  # programs that share a block of vectors
    plans = [
        (width, width * cdiv(cdiv(L, width), splits))
        for width in _TILE_TIMES
        if width <= widest
        for splits in range(1, min(cdiv(L, width), most) + 1)
    ]
    return min(plans, key=lambda each: time(*each))
