r"""The distribution of a clip over the codes, forward and backward, without a `[B T, L]` tensor.

With $d_{tl} = \lVert x_t - e_l \rVert$, $z_t = \ln \sum_l e^{-d_{tl}}$ and a clip of n segments,
$\ln P_l = \ln \sum_t e^{-d_{tl} - z_t} - \ln n$. Forward: `normalizer_kernel` computes z,
`clip_kernel` averages over the segments of a clip. Backward, with $g = \partial L / \partial \ln P$
and $w_{tl} = e^{-d_{tl} - z_t - \ln n - \ln P_l}$, all but z and P is computed again:

$$\frac{\partial L}{\partial d_{tl}} = e^{-d_{tl} - z_t} a_t - g_l w_{tl}, \qquad
  a_t = \sum_l g_l w_{tl}$$

`pull_kernel` computes a, `gradient_kernel` the gradient of the vectors or, with the roles
exchanged, that of the codes. Few vectors would leave a GPU idle, so the sums over codes are split
over programs, and the parts are added in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from mmvq_kernels.distribution import cancellation_threshold
from mmvq_kernels.gpu import launching
from mmvq_kernels.gpu.launching import cdiv

_MOST_PARTS = 8


@triton.jit
def _distances(
    still, moving, still_norms, moving_norms, i, j, NI, NJ, D, lost,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Distances `[BLOCK_I, BLOCK_J]` of rows i of `still` and j of `moving`, 0 where they are lost.

    A distance is lost if its square is below `lost` times the squared norm of the row of `still`.
    The norm of the other row is then the same within 1%.
    """
    products = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for column in tl.range(0, D, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        a = tl.load(
            still + i.to(tl.int64)[:, None] * D + columns[None, :],
            mask=(i < NI)[:, None] & (columns < D)[None, :],
            other=0.0,
        )
        b = tl.load(
            moving + j.to(tl.int64)[None, :] * D + columns[:, None],
            mask=(j < NJ)[None, :] & (columns < D)[:, None],
            other=0.0,
        )
        products = tl.dot(a, b, products, input_precision=PRECISION)
    a_norms = tl.load(still_norms + i, mask=i < NI, other=0.0)[:, None]
    b_norms = tl.load(moving_norms + j, mask=j < NJ, other=0.0)[None, :]
    squares = a_norms + b_norms - 2 * products
    return tl.sqrt(tl.where(squares < lost * a_norms, 0.0, squares))


@triton.jit
def normalizer_kernel(
    x, codes, x_norms, code_norms,
    out,  # fp32 [parts, N]: ln sum_l exp(-d) over a part of the codes
    N, L, D,
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
        d = _distances(
            x, codes, x_norms, code_norms, i, j, N, L, D, lost, BLOCK_I, BLOCK_J, BLOCK_D, PRECISION
        )
        logits = tl.where((j < L)[None, :], -d, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, axis=1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
        top = higher
    tl.store(out + tl.program_id(1).to(tl.int64) * N + i, top + tl.log(total), mask=i < N)


@triton.jit
def clip_kernel(
    codes, x, code_norms, x_norms,
    normalizers,  # fp32 [N]
    used,  # uint8 [N]: whether a segment counts
    log_lengths,  # fp32 [B]: ln n
    out,  # fp32 [B, L]: ln P
    T, N, L, D, lost,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Per program, BLOCK_I codes and one clip."""
    clip = tl.program_id(0)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    top = tl.full([BLOCK_I], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_I], tl.float32)
    for start in tl.range(0, T, BLOCK_J):
        t = start + tl.arange(0, BLOCK_J)
        j = tl.where(t < T, clip * T + t, N)
        d = _distances(
            codes, x, code_norms, x_norms, i, j, L, N, D, lost, BLOCK_I, BLOCK_J, BLOCK_D, PRECISION
        )
        z = tl.load(normalizers + j, mask=j < N, other=0.0)
        counts = tl.load(used + j, mask=j < N, other=0) != 0
        v = tl.where(counts[None, :], -d - z[None, :], -float("inf"))
        higher = tl.maximum(top, tl.max(v, axis=1))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # no valid segment so far
        total = total * tl.exp(top - base) + tl.sum(tl.exp(v - base[:, None]), axis=1)
        top = higher
    log_p = top + tl.log(total) - tl.load(log_lengths + clip)
    tl.store(out + clip.to(tl.int64) * L + i, log_p, mask=i < L)


@triton.jit
def _pulls(row, code, d, normalizers, used, log_lengths, log_p, grad, T, N, L):
    """`p` and `g w` of vectors `row` and codes `code`, two index arrays that broadcast."""
    inside = (row < N) & (code < L)
    clip = row // T
    cells = clip.to(tl.int64) * L + code
    z = tl.load(normalizers + row, mask=row < N, other=0.0)
    log_n = tl.load(log_lengths + clip, mask=row < N, other=0.0)
    log_w = -d - z - log_n - tl.load(log_p + cells, mask=inside, other=0.0)
    counts = (tl.load(used + row, mask=row < N, other=0) != 0) & inside
    g = tl.load(grad + cells, mask=counts, other=0.0)
    # Large distances are off by several nats, and by others than when z and log_p were computed.
    p, w = tl.exp(tl.minimum(-d - z, 0.0)), tl.exp(tl.minimum(log_w, 0.0))
    return tl.where(inside, p, 0.0), g * w


@triton.jit
def pull_kernel(
    x, codes, x_norms, code_norms, normalizers, used, log_lengths, log_p,
    grad,  # fp32 [B, L]
    out,  # fp32 [parts, N]: sum_l g w over a part of the codes
    T, N, L, D, lost, share,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Per program, BLOCK_I vectors against `share` codes."""
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    first = tl.program_id(1) * share
    total = tl.zeros([BLOCK_I], tl.float32)
    for start in tl.range(first, tl.minimum(first + share, L), BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        d = _distances(
            x, codes, x_norms, code_norms, i, j, N, L, D, lost, BLOCK_I, BLOCK_J, BLOCK_D, PRECISION
        )
        _, gw = _pulls(
            i[:, None], j[None, :], d, normalizers, used, log_lengths, log_p, grad, T, N, L
        )
        total += tl.sum(gw, axis=1)
    tl.store(out + tl.program_id(1).to(tl.int64) * N + i, total, mask=i < N)


@triton.jit
def gradient_kernel(
    still,  # [NI, D]: what the gradient is of
    moving,  # [NJ, D]
    still_norms, moving_norms, normalizers, used, log_lengths, log_p, grad,
    pulls,  # fp32 [N]: a
    out,  # fp32 [parts, NI, D]
    T, N, L, D, lost, NI, NJ, share, OF_CODES: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Per program, BLOCK_OUT columns of the gradient of BLOCK_I rows, over `share` others."""
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    columns = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    first = tl.program_id(2) * share
    weights = tl.zeros([BLOCK_I], tl.float32)
    total = tl.zeros([BLOCK_I, BLOCK_OUT], tl.float32)
    for start in tl.range(first, tl.minimum(first + share, NJ), BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        d = _distances(
            still, moving, still_norms, moving_norms, i, j, NI, NJ, D, lost,
            BLOCK_I, BLOCK_J, BLOCK_D, PRECISION,
        )  # fmt: skip
        row = j[None, :] if OF_CODES else i[:, None]
        code = i[:, None] if OF_CODES else j[None, :]
        p, gw = _pulls(row, code, d, normalizers, used, log_lengths, log_p, grad, T, N, L)
        a = tl.load(pulls + row, mask=row < N, other=0.0)
        q = tl.where(d == 0, 0.0, (p * a - gw) / d)  # twice dL / d(d^2)
        others = tl.load(
            moving + j.to(tl.int64)[:, None] * D + columns[None, :],
            mask=(j < NJ)[:, None] & (columns < D)[None, :],
            other=0.0,
        )
        weights += tl.sum(q, axis=1)
        total = tl.dot(q, others, total, input_precision=PRECISION)
    cells = i.to(tl.int64)[:, None] * D + columns[None, :]
    inside = (i < NI)[:, None] & (columns < D)[None, :]
    own = tl.load(still + cells, mask=inside, other=0.0)
    part = tl.program_id(2).to(tl.int64) * NI * D
    tl.store(out + part + cells, own * weights[:, None] - total, mask=inside)


def forward(x: Tensor, codebook: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """`ln P` fp32 `[B, L]` and the normalizers z fp32 `[B, T]`.

    Args:
        x: features, `[B, T, D]`, finite where not used.
        codebook: codes, `[L, D]`.
        used: valid segments, bool `[B, T]`, at least one in every clip.
    """
    (B, T, width), L = x.shape, codebook.shape[0]
    rows, codes, norms, code_norms = _centre(x, codebook)
    (N, D), flags, log_lengths = rows.shape, *_lengths(used)
    sizes, tiles = (N, L, D, cancellation_threshold(torch.float32, width)), _tiles(D)
    parts, share = _split(rows, cdiv(N, 64), L)
    partial = norms.new_empty(parts, N)
    args: tuple[Any, ...] = rows, codes, norms, code_norms, partial, *sizes, share
    launching.launch(normalizer_kernel, (cdiv(N, 64), parts), *args, BLOCK_J=64, **tiles)
    normalizers = partial.logsumexp(0)
    log_p = norms.new_empty(B, L)
    args = codes, rows, code_norms, norms, normalizers, flags, log_lengths, log_p, T, *sizes
    launching.launch(clip_kernel, (B, cdiv(L, 64)), *args, BLOCK_J=16, **tiles)
    return log_p, normalizers.view(B, T)


def backward(
    grad: Tensor,
    x: Tensor,
    codebook: Tensor,
    used: Tensor,
    log_p: Tensor,
    normalizers: Tensor,
    of_codes: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of x `[B, T, D]` and, if `of_codes`, of the codebook `[L, D]`."""
    (B, T, width), L = x.shape, codebook.shape[0]
    rows, codes, norms, code_norms = _centre(x, codebook)
    (N, D), flags, log_lengths = rows.shape, *_lengths(used)
    sizes, tiles = (T, N, L, D, cancellation_threshold(torch.float32, width)), _tiles(D)
    known = normalizers.contiguous(), flags, log_lengths, log_p.contiguous(), grad.contiguous()
    parts, share = _split(rows, cdiv(N, 64), L)
    partial = norms.new_empty(parts, N)
    args: tuple[Any, ...] = rows, codes, norms, code_norms, *known, partial, *sizes, share
    launching.launch(pull_kernel, (cdiv(N, 64), parts), *args, BLOCK_J=32, **tiles)
    pulls = partial.sum(0)

    block_out = min(64, triton.next_power_of_2(D))
    columns = cdiv(D, block_out)

    def gradient(
        still: Tensor, moving: Tensor, still_norms: Tensor, moving_norms: Tensor, of_codes: bool
    ) -> Tensor:
        NI, NJ = still.shape[0], moving.shape[0]
        parts, share = _split(rows, cdiv(NI, 64) * columns, NJ)
        out = norms.new_empty(parts, NI, D)
        grid = (cdiv(NI, 64), columns, parts)
        args = still, moving, still_norms, moving_norms, *known, pulls, out, *sizes, NI, NJ, share
        blocks = {"BLOCK_J": 16, "BLOCK_OUT": block_out, "OF_CODES": of_codes}
        launching.launch(gradient_kernel, grid, *args, **tiles, **blocks)
        return out.narrow(2, 0, width).sum(0)

    of_x = gradient(rows, codes, norms, code_norms, False).unflatten(0, (B, T)).to(x.dtype)
    if not of_codes:
        return of_x, codebook.new_empty(0)
    return of_x, gradient(codes, rows, code_norms, norms, True).to(codebook.dtype)


def _centre(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Vectors `[N, D]` and codes minus the mean code, D padded to 16s; their squared norms."""
    codebook = codebook.float()
    mean = codebook.mean(0)
    padding = (0, -x.shape[-1] % 16)
    rows = pad((x.float() - mean).flatten(0, 1), padding)
    codes = pad(codebook - mean, padding)
    return rows, codes, rows.square().sum(1), codes.square().sum(1)


def _lengths(used: Tensor) -> tuple[Tensor, Tensor]:
    """The valid segments as bytes, which triton can load, and ln n of each clip."""
    return used.contiguous().view(torch.uint8), used.sum(1).float().log()


def _tiles(D: int) -> dict[str, Any]:
    """The options of every launch."""
    return {
        "BLOCK_I": 64,
        "BLOCK_D": 16 if D == 16 else 32,
        "PRECISION": "tf32x3",
        "num_warps": 8,
        "num_stages": 3,
    }


def _split(like: Tensor, programs: int, others: int) -> tuple[int, int]:
    """Parts of `others` rows, enough to give every processor work, and the rows in each."""
    wanted = cdiv(2 * launching.processors(like), max(programs, 1))
    blocks = max(cdiv(others, 64), 1)
    share = cdiv(blocks, min(wanted, _MOST_PARTS))
    return cdiv(blocks, share), share * 64
