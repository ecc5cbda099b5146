r"""The distribution of a clip over the codes, forward and backward, a block of clips at a time.

With $d_{tl} = \lVert x_t - e_l \rVert$, $z_t = \ln \sum_l e^{-d_{tl}}$ and a clip of n segments,
$\ln P_l = \ln \sum_t e^{-d_{tl} - z_t - \ln n}$. Forward: `prepare_kernel` moves vectors and codes
to a centre and weighs the segments, `normalizer_kernel` computes d and z, `clip_kernel` averages
over the segments of a clip. Backward, with $g = \partial L / \partial \ln P$ and
$w_{tl} = e^{-d_{tl} - z_t - \ln n - \ln P_l}$, all but z and P is computed again:

$$\frac{\partial L}{\partial d_{tl}} = e^{-d_{tl} - z_t} a_t - g_l w_{tl}, \qquad
  a_t = \sum_l g_l w_{tl}$$

`pull_kernel` computes a and both terms over d, `gradient_kernel` the gradient of the vectors or,
with the roles exchanged, that of the codes. So distances are computed once in each pass. Few
vectors would leave a GPU idle, so sums are split over programs. Whatever reads the parts adds them,
always in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from mmvq_kernels.distribution import cancellation_threshold
from mmvq_kernels.gpu import launching
from mmvq_kernels.gpu.launching import cdiv
from mmvq_kernels.gpu.nearest import median

_ROWS = 128  # vectors of a program that computes distances
_MOST_PARTS = 64  # of a sum
_DISTANCES = 1 << 24  # that are in memory at a time, 64 MB, but those of one clip at least


@triton.jit
def _centred(
    source, i, valid, NI, codebook, out, norms, L, D, P,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write rows i of `source` about the centre, padded with 0, and their squared norms.

    Rows that are not `valid` are taken to be 0. The centre is the median of the first, middle and
    last code, element by element.
    """
    squares = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, P, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = columns < D
        first = tl.load(codebook + columns, mask=inside, other=0.0)
        middle = codebook + tl.cast(L // 2, tl.int64) * D + columns
        middle = tl.load(middle, mask=inside, other=0.0)
        last = codebook + tl.cast(L - 1, tl.int64) * D + columns
        last = tl.load(last, mask=inside, other=0.0)
        centre = median(first.to(tl.float32), middle.to(tl.float32), last.to(tl.float32))
        row = i.to(tl.int64)[:, None]
        there = valid[:, None] & inside[None, :]
        v = tl.load(source + row * D + columns[None, :], mask=there, other=0.0).to(tl.float32)
        v -= centre[None, :]
        there = (i < NI)[:, None] & (columns < P)[None, :]
        tl.store(out + row * P + columns[None, :], v, mask=there)
        squares += tl.sum(v * v, axis=1)
    tl.store(norms + i, squares, mask=i < NI)


@triton.jit
def prepare_kernel(
    x,  # [N, D]
    codebook,  # [L, D]
    mask,  # uint8 [N]: whether a segment is valid, else it is not read; None: all are
    rows,  # fp32 [N, P], out: x about the centre
    codes,  # fp32 [L, P], out: the codes about the centre
    x_norms, code_norms,  # fp32 [N], [L], out: their squared norms
    weights,  # fp32 [N], out: logarithm of the weight of a segment in the mean of its clip
    T, N, L, D,
    P,  # D padded to a multiple of 16
    BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Per program, BLOCK vectors or BLOCK codes."""
    block, of_x = tl.program_id(0), tl.cdiv(N, BLOCK)
    if block < of_x:
        i = block * BLOCK + tl.arange(0, BLOCK)
        valid = i < N
        n = tl.zeros([BLOCK], tl.float32)
        if mask is not None:
            clip = (i - i % T)[:, None]
            for start in tl.range(0, T, BLOCK_T):
                t = start + tl.arange(0, BLOCK_T)[None, :]
                flags = tl.load(mask + clip + t, mask=(i < N)[:, None] & (t < T), other=0)
                n += tl.sum((flags != 0).to(tl.float32), axis=1)
            valid = tl.load(mask + i, mask=i < N, other=0) != 0
        weight = -tl.log(tl.where(n == 0, T, n))  # without a valid segment all count, as zeros
        weight = tl.where(valid | (n == 0), weight, -float("inf"))
        tl.store(weights + i, weight, mask=i < N)
        _centred(x, i, valid, N, codebook, rows, x_norms, L, D, P, BLOCK, BLOCK_D)
    else:
        i = (block - of_x) * BLOCK + tl.arange(0, BLOCK)
        _centred(codebook, i, i < L, L, codebook, codes, code_norms, L, D, P, BLOCK, BLOCK_D)


@triton.jit
def _squares(
    x, codes, x_norms, code_norms, i, j, N, L, D, lost,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Squared distances `[BLOCK_I, BLOCK_J]` of vectors i and codes j, 0 where they are lost.

    One is lost if it is below `lost` times the squared norm of the vector.
    """
    products = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for column in tl.range(0, D, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        a = tl.load(
            x + i.to(tl.int64)[:, None] * D + columns[None, :],
            mask=(i < N)[:, None] & (columns < D)[None, :],
            other=0.0,
        )
        b = tl.load(
            codes + j.to(tl.int64)[None, :] * D + columns[:, None],
            mask=(j < L)[None, :] & (columns < D)[:, None],
            other=0.0,
        )
        products = tl.dot(a, b, products, input_precision=PRECISION)
    own = tl.load(x_norms + i, mask=i < N, other=0.0)[:, None]
    squares = own + tl.load(code_norms + j, mask=j < L, other=0.0)[None, :] - 2 * products
    return tl.where(squares < lost * own, 0.0, squares)


@triton.jit
def normalizer_kernel(
    x, codes, x_norms, code_norms,
    distances,  # fp32 [N, S], out: those of L codes, and padding to a multiple of 16
    out,  # fp32 [parts, N]: ln sum_l exp(-d) over a part of the codes
    N, L, S, D,
    lost,  # share of a squared norm below which a squared distance is rounding error
    share,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Per program, BLOCK_I vectors against `share` codes."""
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    first = tl.program_id(1) * share
    top = tl.full([BLOCK_I], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_I], tl.float32)
    for start in tl.range(first, tl.minimum(first + share, L), BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        squares = _squares(
            x, codes, x_norms, code_norms, i, j, N, L, D, lost, BLOCK_I, BLOCK_J, BLOCK_D, PRECISION
        )
        d = tl.sqrt(squares)
        cells = i.to(tl.int64)[:, None] * S + j[None, :]
        tl.store(distances + cells, d, mask=(i < N)[:, None] & (j < S)[None, :])
        logits = tl.where((j < L)[None, :], -d, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, axis=1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
        top = higher
    tl.store(out + tl.program_id(1).to(tl.int64) * N + i, top + tl.log(total), mask=i < N)


@triton.jit
def clip_kernel(
    distances,  # fp32 [N, S], from normalizer_kernel
    partial,  # fp32 [parts, N], likewise
    weights,  # fp32 [N]
    normalizers,  # fp32 [N], out
    out,  # fp32 [B, L]: ln P
    parts, T, N, L, S,
    BLOCK_T: tl.constexpr, CODES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Per program, CODES codes and one clip."""
    clip = tl.program_id(0)
    code = tl.program_id(1) * CODES + tl.arange(0, CODES)
    part = tl.arange(0, PARTS)[None, :]
    top = tl.full([CODES], -float("inf"), tl.float32)
    total = tl.zeros([CODES], tl.float32)
    for start in tl.range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        row = clip * T + t
        there = (t < T)[:, None]
        of_parts = partial + part.to(tl.int64) * N + row[:, None]
        z = tl.load(of_parts, mask=there & (part < parts), other=-float("inf"))
        highest = tl.max(z, axis=1)
        z = highest + tl.log(tl.sum(tl.exp(z - highest[:, None]), axis=1))
        tl.store(normalizers + row, z, mask=(t < T) & (tl.program_id(1) == 0))
        shift = tl.load(weights + row, mask=t < T, other=-float("inf")) - tl.where(t < T, z, 0.0)
        cells = distances + row.to(tl.int64)[:, None] * S + code[None, :]
        v = shift[:, None] - tl.load(cells, mask=there & (code < S)[None, :], other=0.0)
        higher = tl.maximum(top, tl.max(v, axis=0))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # no valid segment so far
        total = total * tl.exp(top - base) + tl.sum(tl.exp(v - base[None, :]), axis=0)
        top = higher
    tl.store(out + clip.to(tl.int64) * L + code, top + tl.log(total), mask=code < L)


@triton.jit
def pull_kernel(
    x, codes, x_norms, code_norms, normalizers, weights, log_p,
    grad,  # fp32 [B, L]
    p_d, gw_d,  # fp32 [N, S], out: p / d and g w / d, 0 where d is 0 and in the padding
    out,  # fp32 [parts, N]: sum_l g w over a part of the codes
    T, N, L, S, D, lost, share,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Per program, BLOCK_I vectors against `share` codes."""
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    first = tl.program_id(1) * share
    total = tl.zeros([BLOCK_I], tl.float32)
    z = tl.load(normalizers + i, mask=i < N, other=0.0)[:, None]
    weight = tl.load(weights + i, mask=i < N, other=-float("inf"))[:, None]
    row, clip = i.to(tl.int64)[:, None] * S, (i // T).to(tl.int64)[:, None] * L
    for start in tl.range(first, tl.minimum(first + share, L), BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        squares = _squares(
            x, codes, x_norms, code_norms, i, j, N, L, D, lost, BLOCK_I, BLOCK_J, BLOCK_D, PRECISION
        )
        d = tl.sqrt(squares)
        inside = (i < N)[:, None] & (j < L)[None, :]
        there = (i < N)[:, None] & (j < S)[None, :]
        inverse = tl.where((squares == 0) | (j >= L)[None, :], 0.0, tl.rsqrt(squares))
        # Large distances are off by several nats, perhaps by others than those of z and ln P.
        p = tl.exp(tl.minimum(-d - z, 0.0))
        tl.store(p_d + row + j[None, :], p * inverse, mask=there)
        log_w = weight - z - d  # in this order, as in `clip_kernel`: so it is rounded alike
        log_w -= tl.load(log_p + clip + j[None, :], mask=inside, other=0.0)
        g = tl.load(grad + clip + j[None, :], mask=inside, other=0.0)
        gw = g * tl.exp(tl.minimum(log_w, 0.0))
        total += tl.sum(gw, axis=1)
        tl.store(gw_d + row + j[None, :], gw * inverse, mask=there)
    tl.store(out + tl.program_id(1).to(tl.int64) * N + i, total, mask=i < N)


@triton.jit
def gradient_kernel(
    still,  # [NI, D]: what the gradient is of
    moving,  # [NJ, D]
    p_d, gw_d,  # fp32 [N, S], from pull_kernel
    pulls,  # fp32 [pull_parts, N], likewise
    a,  # fp32 [N], their sum: out, and in for the gradient of the codes
    mask,  # as for `prepare_kernel`; None for the gradient of the codes too
    out,  # [parts, NI, D]
    N, S, D, pull_parts, NI, NJ, share, OF_CODES: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Per program, BLOCK_D columns of the gradient of BLOCK_I rows, over `share` others."""
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.program_id(2) * share
    sums = tl.zeros([BLOCK_I], tl.float32)
    total = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    if not OF_CODES:
        part = tl.arange(0, PARTS)[None, :]
        of_parts = pulls + part.to(tl.int64) * N + i[:, None]
        there = (i < NI)[:, None] & (part < pull_parts)
        pull = tl.sum(tl.load(of_parts, mask=there, other=0.0), axis=1)
        alone = (tl.program_id(1) == 0) & (tl.program_id(2) == 0)
        tl.store(a + i, pull, mask=(i < NI) & alone)
        pull = pull[:, None]
    for start in tl.range(first, tl.minimum(first + share, NJ), BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        if OF_CODES:
            row, code, pull = j[None, :], i[:, None], tl.load(a + j, mask=j < N, other=0.0)[None, :]
        else:
            row, code = i[:, None], j[None, :]
        inside, cells = (row < N) & (code < S), row.to(tl.int64) * S + code
        q = tl.load(p_d + cells, mask=inside, other=0.0) * pull  # twice dL / d(d^2)
        q -= tl.load(gw_d + cells, mask=inside, other=0.0)
        others = tl.load(
            moving + j.to(tl.int64)[:, None] * D + columns[None, :],
            mask=(j < NJ)[:, None] & (columns < D)[None, :],
            other=0.0,
        )
        sums += tl.sum(q, axis=1)
        total = tl.dot(q, others, total, input_precision=PRECISION)
    cells = i.to(tl.int64)[:, None] * D + columns[None, :]
    inside = (i < NI)[:, None] & (columns < D)[None, :]
    own = tl.load(still + cells, mask=inside, other=0.0)
    total = own * sums[:, None] - total
    if mask is not None:
        valid = tl.load(mask + i, mask=i < NI, other=0) != 0
        total = tl.where(valid[:, None], total, 0.0)
    tl.store(out + tl.program_id(2).to(tl.int64) * NI * D + cells, total, mask=inside)


def forward(x: Tensor, codebook: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`ln P` fp32 `[B, L]` and the normalizers z fp32 `[B, T]`.

    Args:
        x: features, `[B, T, D]`, T at least 1.
        codebook: codes, `[L, D]`.
        mask: valid segments, bool `[B, T]`; None: all are.
    """
    (B, T, width), L = x.shape, codebook.shape[0]
    rows, codes, norms, code_norms, weights = _prepare(x, codebook, mask)
    log_p, normalizers = norms.new_empty(B, L), norms.new_empty(B, T)
    D, S, lost = rows.shape[1], L + -L % 16, cancellation_threshold(torch.float32, width)
    clips = _clips(B, T, S)
    distances = norms.new_empty(clips * T, S)
    inputs, results = (rows, norms, weights), (normalizers, log_p)
    for r, x_norms, w, z, ln_p in _blocks(clips, T, inputs, results):
        N, parts, share = len(r), *_split(r, cdiv(len(r), _ROWS), L)
        partial = norms.new_empty(parts, N)
        args: tuple[Any, ...] = r, codes, x_norms, code_norms, distances, partial
        args = *args, N, L, S, D, lost, share
        launching.launch(normalizer_kernel, (cdiv(N, _ROWS), parts), *args, BLOCK_J=64, **_tiles(D))
        args = distances, partial, w, z, ln_p, parts, T, N, L, S
        options = {"BLOCK_T": 16, "CODES": 128, "PARTS": _MOST_PARTS, "num_warps": 4}
        launching.launch(clip_kernel, (N // T, cdiv(L, 128)), *args, **options)
    return log_p, normalizers


def backward(
    grad: Tensor,
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    log_p: Tensor,
    normalizers: Tensor,
    of_codes: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of x `[B, T, D]` and, if `of_codes`, of the codebook `[L, D]`."""
    (B, T, width), L = x.shape, codebook.shape[0]
    rows, codes, norms, code_norms, weights = _prepare(x, codebook, mask)
    D, S, lost = rows.shape[1], L + -L % 16, cancellation_threshold(torch.float32, width)
    clips = _clips(B, T, 2 * S)
    p_d, gw_d = (norms.new_empty(clips * T, S) for _ in range(2))

    def gradient(still: Tensor, moving: Tensor, dtype: torch.dtype, *args: Any) -> Tensor:
        NI, NJ = still.shape[0], moving.shape[0]
        grid = cdiv(NI, _ROWS), cdiv(D, 128)
        parts, share = _split(rows, grid[0] * grid[1], NJ)
        out = still.new_empty(parts, NI, D, dtype=dtype if parts == 1 else torch.float32)
        args = still, moving, p_d, gw_d, *args, out, len(a), S, D, len(pulls), NI, NJ, share
        options = {"OF_CODES": still is codes, "PARTS": _MOST_PARTS, **_tiles(D), "BLOCK_J": 16}
        options["BLOCK_D"] = min(128, triton.next_power_of_2(D))
        launching.launch(gradient_kernel, (*grid, parts), *args, **options)
        out = out.squeeze(0) if parts == 1 else out.sum(0).to(dtype)
        return out if width == D else pad(out, (0, width - D))

    of_x: list[Tensor] = []
    of_codebook = codebook.new_empty(0)
    inputs, known = (rows, norms, weights), (normalizers, log_p, grad, mask)
    for r, x_norms, w, z, ln_p, g, valid in _blocks(clips, T, inputs, known):
        N, parts, share = len(r), *_split(r, cdiv(len(r), _ROWS), L)
        pulls, a = norms.new_empty(parts, N), norms.new_empty(N)
        args: tuple[Any, ...] = r, codes, x_norms, code_norms, z, w, ln_p, g, p_d, gw_d, pulls
        args = *args, T, N, L, S, D, lost, share
        launching.launch(pull_kernel, (cdiv(N, _ROWS), parts), *args, BLOCK_J=32, **_tiles(D))
        of_x.append(gradient(r, codes, x.dtype, pulls, a, launching.as_bytes(valid)))
        if of_codes:
            dtype = codebook.dtype if N == B * T else torch.float32
            more = gradient(codes, r, dtype, pulls, a, None)
            of_codebook = more if of_codebook.numel() == 0 else of_codebook + more
    all_of_x = of_x[0] if len(of_x) == 1 else torch.cat(of_x)
    return all_of_x.unflatten(0, (B, T)), of_codebook.to(codebook.dtype)


def _prepare(
    x: Tensor, codebook: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Vectors `[N, P]` and codes `[L, P]` about a centre, their squared norms, and ln weights."""
    (B, T, D), L = x.shape, codebook.shape[0]
    N, P = B * T, D + -D % 16
    rows, codes, norms, code_norms, weights = (
        x.new_empty(size, dtype=torch.float32) for size in ((N, P), (L, P), N, L, N)
    )
    launching.launch(
        prepare_kernel,
        (cdiv(N, 16) + cdiv(L, 16),),
        x.contiguous(),
        codebook.contiguous(),
        launching.as_bytes(mask),
        rows,
        codes,
        norms,
        code_norms,
        weights,
        T,
        N,
        L,
        D,
        P,
        BLOCK=16,
        BLOCK_T=64,
        BLOCK_D=16 if P == 16 else 128,
        num_warps=4,
    )
    return rows, codes, norms, code_norms, weights


def _clips(B: int, T: int, L: int) -> int:
    """How many clips may have their distances in memory at a time, at least one."""
    clips = max(1, _DISTANCES // (T * L))
    clips -= clips % 4 if clips > 4 else 0  # so that loads of 16 bytes stay possible
    return min(clips, max(B, 1))


def _blocks(
    clips: int, T: int, of_segments: tuple[Tensor, ...], of_clips: tuple[Tensor | None, ...]
) -> Iterator[Any]:
    """The tensors of some clips after the other, those with a row for each segment first."""
    parts = [t.split(clips * T) for t in of_segments]
    parts += [repeat(t) if t is None else t.contiguous().split(clips) for t in of_clips]
    return zip(*parts)  # noqa: B905 - None goes with any number


def _tiles(D: int) -> dict[str, Any]:
    """The options of what computes distances."""
    options = {"BLOCK_I": _ROWS, "BLOCK_D": 16 if D == 16 else 32}
    return options | {"PRECISION": "tf32x3", "num_warps": 8, "num_stages": 3}


def _split(like: Tensor, programs: int, others: int) -> tuple[int, int]:
    """Parts of `others` rows, enough to give every processor work, and the rows in each."""
    wanted = cdiv(2 * launching.processors(like), max(programs, 1))
    blocks = max(cdiv(others, 64), 1)
    share = cdiv(blocks, min(wanted, _MOST_PARTS))
    return cdiv(blocks, share), share * 64
