"""Nearest code (Eq. 2): `argmin_l |x - e_l|`. Reference, torch path, operator.

The Triton kernel is in `mmvq_kernels/gpu/nearest.py`, which only a GPU imports.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from mmvq_kernels.backends import (
    Backend,
    register_sequential_vmap,
    require,
    runs_triton,
    through_operator,
)
from mmvq_kernels.checks import is_cpu_readable
from mmvq_kernels.hashing import repeats_an_earlier_row
from mmvq_kernels.messages import message
from mmvq_kernels.products import matmul_t
from mmvq_kernels.rounding import rounded_mean

_FEW = 8  # vectors on a CPU for which to prepare the codes would be most of the work
_TILE = 1024  # codes in a block of scores
_WINDOW = 128  # codes that one thread looks through at a time
_ROWS = 48  # vectors in a block are a multiple: a product rounds at its edges in another way
_BLOCK_BYTES = 1 << 22  # of scores at a time: large for a matrix product, small for a cache

Precision = Literal["exact", "fast"]
_PRECISIONS = get_args(Precision)  # dynamo of older torch cannot trace the call


def nearest_code_ref(x: Tensor, codebook: Tensor) -> Tensor:
    """`argmin_l |x - e_l|^2` in float64, every difference written out; the lowest index on ties.

    A code that is not finite is as if it were not there.

    Examples:
        >>> x, codebook = torch.randn(9, 4), torch.randn(5, 4)
        >>> torch.equal(nearest_code(x, codebook), nearest_code_ref(x, codebook))
        True
    """
    x, codebook = x.double(), codebook.double()
    return (x[:, None] - codebook).square().sum(-1).nan_to_num(torch.inf, torch.inf).argmin(-1)


def nearest_code(
    x: Tensor,
    codebook: Tensor,
    *,
    backend: Backend = "auto",
    precision: Precision = "exact",
) -> Tensor:
    """Index of the code nearest to each row: `argmin_l |x - e_l|^2` (Eq. 2).

    The search maximises `x . e'_l - h_l` over centred codes `e' = e - mean(e)`, with
    `h = |e'|^2 / 2 + mean(e) . e'`: the same order as the distance, no `|x|^2`, no clamp, and
    little rounding where the codes lie close together, away from the origin. Scores are made in
    blocks; no `[N, L]` tensor exists. On a CPU, up to 8 rows are compared with the codes by
    differences instead. So of two codes whose scores differ by rounding alone, a row may get the
    one here and the other in a larger batch.

    Args:
        x: vectors, `[N, D]`, any float dtype. Computed in the wider of its dtype, the codebook's
            and float32.
        codebook: codes, `[L, D]`, L >= 1.
        backend: `"auto"`, `"torch"` or `"triton"`.
        precision: `"exact"` (Triton multiplies in tf32x3, as near as float32), or `"fast"`: on a
            GPU tf32 products, bf16 ones for a bfloat16 `x`. The torch path is always exact, on a
            GPU as far as `torch.set_float32_matmul_precision` leaves it at its default.

    Returns:
        int64 `[N]`. Ties go to the lowest index. A row that is not finite gets index 0, as may one
        whose scores overflow. A code that is not finite is as if it were not there.

    Raises:
        ValueError: shapes that do not fit, an empty codebook, an unknown backend or precision.
        TypeError: tensors that are not floating point.
        RuntimeError: the backend cannot run here; under `torch.jit.trace`, and the ONNX exporter
            that traces.

    Examples:
        >>> codebook = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        >>> nearest_code(torch.tensor([[0.9, 0.8], [0.1, 0.2]]), codebook)
        tensor([1, 0])
    """
    _check(x, codebook, precision)
    require("nearest_code", backend, x, codebook)
    x, codebook = x.detach(), codebook.detach()
    if not through_operator(backend, x):
        return _search_torch(x, codebook)
    indices: Tensor = _nearest_code(x, codebook, precision == "fast")
    return indices


@torch.library.custom_op("mmvq::nearest_code", mutates_args=())
def _nearest_code(x: Tensor, codebook: Tensor, fast: bool) -> Tensor:
    return _search_torch(x, codebook)


@_nearest_code.register_kernel("cuda")
def _(x: Tensor, codebook: Tensor, fast: bool) -> Tensor:
    if not runs_triton(x, codebook):
        return _search_torch(x, codebook)
    from mmvq_kernels.gpu.nearest import search

    return search(x, codebook, fast=fast)


@_nearest_code.register_fake
def _(x: Tensor, codebook: Tensor, fast: bool) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.long)


register_sequential_vmap(_nearest_code)


def _search_torch(x: Tensor, codebook: Tensor) -> Tensor:
    if is_cpu_readable(x) and len(x) <= _FEW:
        return _search_few(x, codebook)
    dtype = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return _nearest_code_torch(x, codebook.to(dtype))


def _search_few(x: Tensor, codebook: Tensor) -> Tensor:
    """All distances from differences: in float32, and in float64 for the codes in doubt.

    A distance that is a root of a sum of D squares of differences is off by at most D / 2 + 3 unit
    roundoffs, unless the squares underflow. So the nearest code is within twice that of the least.
    """
    single, exact = torch.finfo(torch.float32), "donot_use_mm_for_euclid_dist"
    if torch.float64 not in (x.dtype, codebook.dtype):
        distances = torch.cdist(x.float(), codebook.float(), compute_mode=exact).numpy()
        least = distances.min(1, keepdims=True)
        if ((least > single.tiny**0.25) & (least < math.inf)).all():  # no NaN either
            near = distances <= least * (1 + (x.shape[1] + 8) * single.eps)
            if (near.sum(1) == 1).all():
                return torch.from_numpy(distances.argmin(1))
            codes = torch.from_numpy(near.any(0)).nonzero()[:, 0]
            apart = torch.cdist(x.double(), codebook[codes].double(), compute_mode=exact)
            return codes[apart.argmin(1)]
    blocks = codebook.split(max(1, _BLOCK_BYTES // (8 * codebook.shape[1])))
    parts = [torch.cdist(x.double(), codes.double(), compute_mode=exact) for codes in blocks]
    return torch.cat(parts, 1).nan_to_num_(torch.inf, torch.inf).argmin(1)


def _nearest_code_torch(x: Tensor, codebook: Tensor) -> Tensor:
    """Blocks of rows against tiles of codes; one block of scores exists at a time."""
    mean, substitutes = rounded_mean(codebook), None
    if not (is_cpu_readable(mean) and mean.isfinite().numpy().all()):
        substitutes = _substitutes(codebook)
        codebook = codebook[substitutes]
        mean = rounded_mean(codebook)
    (N, D), L = x.shape, codebook.shape[0]
    room = _BLOCK_BYTES * (1 if x.device.type == "cpu" else 32) // codebook.element_size()
    length = max(_ROWS, min(N + -N % _ROWS, room // min(L, _TILE) // _ROWS * _ROWS))
    block = codebook.new_ones(length, D + 1)
    greatest = codebook.new_full((N + -N % _ROWS,), -torch.inf)
    indices = torch.zeros_like(greatest, dtype=torch.long)
    tiles = _scorers(codebook, mean).split(_TILE)
    for start in range(0, N, length):
        rows, best, index = (t[start : start + length] for t in (x, greatest, indices))
        block[: len(rows), :D] = rows
        for i, codes in enumerate(tiles):
            score, code = _best(matmul_t(codes, block[: len(best)]))
            torch.where(score > best, code + i * _TILE, index, out=index)
            torch.maximum(score, best, out=best)  # keeps a NaN
    if substitutes is not None:
        indices = substitutes[indices]
    return torch.where(greatest.isfinite(), indices, 0)[:N]


def _substitutes(codebook: Tensor) -> Tensor:
    """Of each code its own index, of one that is not finite that of the first finite one: `[L]`."""
    finite = codebook.isfinite().all(1)
    own = torch.arange(len(codebook), device=codebook.device)
    return torch.where(finite, own, finite.int().argmax())


def _scorers(codebook: Tensor, mean: Tensor) -> Tensor:
    """Rows `(e', -h)`, whose product with `(x, 1)` is the score: `[L, D + 1]`."""
    scorers = codebook.new_empty(codebook.shape[0], codebook.shape[1] + 1)
    half_norm = scorers[:, -1]
    for codes, rows in zip(codebook.split(_TILE), scorers.split(_TILE), strict=True):
        rows[:, :-1] = centred = codes - mean
        rows[:, -1] = (codes + mean).mul_(centred).sum(1)  # |e'|^2 + 2 mean . e'
    half_norm.mul_(-0.5).masked_fill_(repeats_an_earlier_row(codebook), -torch.inf)
    return scorers  # of equal rows the lowest index wins


def _best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest of each column of `[C, R]` and its lowest index: in windows, then of these."""
    if scores.device.type != "cpu":
        return scores.max(0)
    scores, codes = _pool(scores, _WINDOW)  # [W, R]
    score, window = _pool(scores, len(scores))  # [1, R]
    return score[0], codes.gather(0, window)[0]


def _pool(scores: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Max pooling with the rows as channels in the last place: `[C, R]` -> two of `[W, R]`.

    The only arg-reduction that torch vectorises on a CPU, six times as fast as `max`.
    """
    image = scores[None, :, None].permute(0, 3, 1, 2)  # [1, R, C, 1]
    best, codes = max_pool2d(image, (window, 1), ceil_mode=True, return_indices=True)
    return best[0, :, :, 0].T, codes[0, :, :, 0].T


def _check(x: Tensor, codebook: Tensor, precision: str) -> None:
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            message(
                "nearest_code",
                "torch.jit.trace, and torch.onnx.export(dynamo=False), cannot record the search",
                hint="use torch.export.export; for ONNX mmvq.onnx.export(quantizer, path), or "
                "torch.onnx.export(..., dynamo=True) with custom_translation_table="
                "mmvq.onnx.translation_table()",
                tracing=True,
            )
        )
    if not (x.is_floating_point() and codebook.is_floating_point()):
        raise TypeError(
            message(
                "nearest_code",
                "x and codebook must be floating point",
                hint="convert with .float()",
                x=x,
                codebook=codebook,
            )
        )
    if x.ndim != 2 or codebook.ndim != 2 or x.shape[1] != codebook.shape[1]:
        raise ValueError(
            message(
                "nearest_code",
                "x [N, D] and codebook [L, D] must share their last dimension",
                hint="flatten x to two dimensions and project it to the codebook's width",
                x=x,
                codebook=codebook,
            )
        )
    if codebook.numel() == 0:
        raise ValueError(
            message(
                "nearest_code",
                "codebook must not be empty",
                hint="build the codebook with size >= 1 and dim >= 1",
                codebook=codebook,
            )
        )
    if precision not in _PRECISIONS:
        raise ValueError(
            message(
                "nearest_code",
                'precision must be "exact" or "fast"',
                hint='leave it at "exact" unless a wrong code now and then is fine',
                precision=precision,
            )
        )
