"""Filter and recheck: most rows of a large search need one product of high parts.

With X, E the high parts of a vector and a code, dx, de the low ones, as `prepare_kernel` cuts them
and r = 1 / (s_x s_e), the exact search compares scores `h - r (X.E + dx.E + X.de)`, the filter
`h - r X.E`, with the same h and r. The difference is at most `r (|dx| |E| + |X| |de|)`, by the
measured norms, and what both lose in their sums. That is taken to be at most P 2^-22 |X| |E| each:
no partial sum is above |X| |E|, and an instruction that adds k products to a sum cuts k + 1 terms
and the result at 2^-23 of the greatest or finer, so that a product costs (k + 2) / k 2^-23, from
k = 2 on at most 2^-22; in the exact search the sums of low parts, 2^-10 of that, come first, each
step from 0. So with the greatest |E| and |de| of all codes, no score is off by more than

    bound = r |dx| |E| + r |X| (|de| + P 2^-21 |E|)

with 2% more, for the norms and for sums of steps, up to P 2^16, before its last rounding, by
2^-24 of itself, in both. Where the second least score of the filter is above the least by more
than 2 bound + 2^-21 (|least| + |second|), the exact search has its least score at the same code,
and nowhere else: the index is its own to the bit, and a row gets the same one on either way. 2^-120
more is for products below the smallest floats. Of a row that is proven, the least and the greatest
r |X| |E| are below 2^126, and |X| / s_x is below 2^116: no product overflows, no score is NaN, and
one that is infinite is so by its half-norm, far above, and counts as the greatest float. A row that
is not finite has norms NaN, which prove nothing; a code that is not has the score inf in both.

One code far from the others shall not spoil the bound. With r_x |X| <= a / 4, a = r_e |E|, all
products are below 1.02 a^2 / 4 (up to P 2^14), and the score is at least (.49 - .255) a^2, in both.
So codes with a above `reach`, the greatest of 4 r_x |X| and sqrt(5 least) of a program's vectors,
have scores that are above the least by more than its error, and do not count for the bound; those
above 2^62 do, for the sake of overflow. (Where a^2 underflows, so does all else, within 2^-120.)

Equal scores of the exact search, so all ties, are never proven. Rows that are not are listed, in
any order, for `search_kernel`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mmvq_kernels.gpu import launching
from mmvq_kernels.gpu.launching import cdiv
from mmvq_kernels.gpu.tiles import Tile

# By name of the device, and by the most columns: the tile, and the fewest pairs of a vector and a
# code for which the filter pays. A device that is not here has no filter; nor may one that flushes
# subnormal float16 numbers, for which the bound does not hold.
FILTERS: dict[str, dict[float, tuple[Tile, int]]] = {}


@triton.jit
def split_eights(x, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr):
    """The even and the odd eights of columns."""
    return tl.split(tl.permute(tl.reshape(x, [BLOCK_N, PAIRS, 2, 8]), (0, 1, 3, 2)))


@triton.jit
def _keep_two(
    best, index, second, products, factor, inverse, half_norm, start,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """As `_keep_least`, and the second least of the columns."""
    codes = start + tl.arange(0, BLOCK_L)
    products = products * factor[:, None]
    least = products * tl.load(inverse + codes)[None, :] + tl.load(half_norm + codes)[None, :]
    at = tl.broadcast_to((tl.arange(0, BLOCK_L) & -8)[None, :], [BLOCK_N, BLOCK_L])
    for i in tl.static_range(4, 12):
        if BLOCK_L >> i > 0:
            a, b = split_eights(least, BLOCK_N, BLOCK_L >> i)
            here, there = split_eights(at, BLOCK_N, BLOCK_L >> i)
            least = tl.minimum(a, b)
            at = tl.where(least == a, here, there)
            if i == 4:
                more = tl.maximum(a, b)
            else:
                c, d = split_eights(more, BLOCK_N, BLOCK_L >> i)
                more = tl.minimum(tl.maximum(a, b), tl.minimum(c, d))
    least, at = tl.reshape(least, [BLOCK_N, 8]), tl.reshape(at, [BLOCK_N, 8])
    more = tl.minimum(tl.reshape(more, [BLOCK_N, 8]), tl.maximum(least, best))
    less = least < best
    index = tl.where(less, start + at, index)
    return tl.where(less, least, best), index, tl.where(more < second, more, second)


@triton.jit
def filter_kernel(
    high,  # fp16 [R + ..., P], from prepare_kernel, as the next three
    inverse,  # fp32 [R + ...]
    half_norm,  # fp32 [R]
    norms,  # fp32 [R + ..., 2]: |high| / s, |low| / s
    counters,  # int32: two 0s; out: rows listed, rows looked at
    listed,  # int32 [N], out: the rows that are not proven
    out,  # int64 [N], out: the index of those that are
    N,
    L,
    R,
    P,  # a multiple of BLOCK_D
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONCE: tl.constexpr,  # P is BLOCK_D: vectors are read once
    PRECISION: tl.constexpr,  # "fp16": for the audit
):
    """Per program, BLOCK_N vectors against all codes, unless most rows so far were not proven."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    doubted = (rows < N).to(tl.int32)
    # atomic, so that one thread reads for all, which take the same way
    looked = tl.atomic_add(counters + 1, 0, sem="relaxed")
    if (looked < 4096) | (tl.atomic_add(counters, 0, sem="relaxed") <= looked // 2):
        columns = tl.arange(0, BLOCK_D)
        x_cells = (R + rows)[:, None] * P + columns[None, :]
        factor = tl.load(inverse + R + rows) * -(2.0**-14)
        best = tl.full([BLOCK_N, 8], float("inf"), tl.float32)
        second = tl.full([BLOCK_N, 8], float("inf"), tl.float32)
        index = tl.zeros([BLOCK_N, 8], tl.int32)
        if ONCE:
            x = tl.load(high + x_cells)
            for start in tl.range(0, L, BLOCK_L):
                cells = (start + tl.arange(0, BLOCK_L)).to(tl.int64)[None, :] * P + columns[:, None]
                products = tl.dot(x, tl.load(high + cells))
                best, index, second = _keep_two(
                    best, index, second, products, factor, inverse, half_norm, start,
                    BLOCK_N, BLOCK_L,
                )  # fmt: skip
        else:
            start, column = -BLOCK_L, P - BLOCK_D
            products = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
            for _ in tl.range(0, tl.cdiv(L, BLOCK_L) * (P // BLOCK_D)):
                start = tl.where(column == P - BLOCK_D, start + BLOCK_L, start)
                column = tl.where(column == P - BLOCK_D, 0, column + BLOCK_D)
                x = tl.load(high + x_cells + column)
                cells = (start + tl.arange(0, BLOCK_L)).to(tl.int64)[None, :] * P + columns[:, None]
                products = tl.dot(x, tl.load(high + cells + column), products)
                if column == P - BLOCK_D:
                    best, index, second = _keep_two(
                        best, index, second, products, factor, inverse, half_norm, start,
                        BLOCK_N, BLOCK_L,
                    )  # fmt: skip
                    products = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
        least = tl.min(best, axis=1)
        index += tl.arange(0, 8)[None, :]
        nearest = tl.min(tl.where(best == least[:, None], index, 0x7FFFFFFF), axis=1)
        best = tl.where(index == nearest[:, None], second, best)
        second = tl.minimum(tl.min(tl.minimum(best, second), axis=1), 3.4e38)
        x_norm, x_low = tl.load(norms + 2 * (R + rows)), tl.load(norms + 2 * (R + rows) + 1)
        reach = tl.maximum(4 * x_norm, tl.sqrt(5 * tl.maximum(least, 0.0)))
        reach = tl.max(tl.where(x_norm == x_norm, reach, 0.0), axis=0)
        norm = tl.zeros([1024], tl.float32)  # the greatest of the codes that are not far
        low_norm = tl.zeros([1024], tl.float32)
        for start in tl.range(0, R, 1024):
            at = norms + 2 * (start + tl.arange(0, 1024)).to(tl.int64)
            there = start + tl.arange(0, 1024) < R
            each = tl.load(at, mask=there, other=0.0)
            near = (each <= reach) | (each > 2.0**62)
            norm = tl.maximum(norm, tl.where(near, each, 0.0))
            low = tl.load(at + 1, mask=there, other=0.0)
            low_norm = tl.maximum(low_norm, tl.where(near, low, 0.0))
        norm = tl.max(norm, axis=0)
        lost = tl.max(low_norm, axis=0) + norm * (P * 2.0**-21)
        bound = 1.02 * (x_low * norm + x_norm * lost)
        greatest = tl.maximum(tl.abs(least), x_norm * norm)
        apart = 2 * bound + 2.0**-21 * (tl.abs(least) + tl.abs(second)) + 2.0**-120
        finite = (greatest < 2.0**126) & (x_norm < 2.0**116)
        proven = (second - least > apart) & finite
        tl.store(out + rows, nearest.to(tl.int64), mask=proven & (rows < N))
        doubted = tl.where(proven, 0, doubted)
        tl.atomic_add(counters + 1, BLOCK_N, sem="relaxed")
    to = tl.atomic_add(counters, tl.sum(doubted, axis=0), sem="relaxed")
    to += tl.cumsum(doubted, axis=0) - 1
    tl.store(listed + to, rows.to(tl.int32), mask=doubted > 0)


def chosen(N: int, L: int, P: int, device: str) -> Tile | None:
    """The tile of the filter where the device has one that pays."""
    for most, (tile, pairs) in sorted(FILTERS.get(device, {}).items()):
        if most >= P:
            return tile if N * L >= pairs else None
    return None


def launch(
    tile: Tile,
    widest: int,  # codes
    prepared: tuple[Tensor, Tensor | None, Tensor, Tensor],
    norms: Tensor,
    counters: Tensor,
    out: Tensor,
    L: int,
) -> Tensor:
    """Writes the index of each row that is proven; the others are listed, counters[0] of them."""
    high, _, inverse, half_norm = prepared
    capability, (N,), P = launching.capability(high), out.shape, high.shape[1]
    hopper, large = capability == 90, capability // 10 in (9, 10, 11)  # in shared memory
    once = P <= 64 or (hopper and P in (128, 256))
    listed = counters.new_empty(N)
    options = {"maxnreg": 255} if capability >= 100 else {}  # as for the search
    launching.launch(
        filter_kernel,
        (cdiv(N, tile.rows),),
        *(high, inverse, half_norm, norms, counters, listed, out, N, L, len(half_norm), P),
        BLOCK_N=tile.rows,
        BLOCK_L=min(tile.codes, widest),
        BLOCK_D=P if once else 64 if large else 32,
        ONCE=once,
        PRECISION="fp16",
        num_warps=tile.warps,
        num_stages=tile.stages if hopper else 2 if large else 3,
        **options,
    )
    return listed
