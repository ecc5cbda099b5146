"""Nearest code (Eq. 2): `argmin_l |x - e_l|`. Reference, torch path, operator.

The Triton kernel is in `mmvq_kernels/gpu/nearest.py`, which only a GPU imports.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from mmvq_kernels.backends import Backend, require
from mmvq_kernels.checks import is_cpu_readable
from mmvq_kernels.hashing import repeats_an_earlier_row
from mmvq_kernels.messages import message
from mmvq_kernels.operators import register
from mmvq_kernels.products import matmul_t

_FEW = 8  # vectors on a CPU for which to prepare the codes would be most of the work
_TILE = 1024  # codes in a block of scores
_WINDOW = 128  # codes that one thread looks through at a time
_ROWS = 48  # vectors in a block are a multiple: a product rounds at its edges in another way
_BLOCK_BYTES = 1 << 22  # of scores at a time: large for a matrix product, small for a cache

Precision = Literal["exact", "fast"]
_PRECISIONS = get_args(Precision)  # dynamo of older torch cannot trace the call


def nearest_code_ref(x: Tensor, codebook: Tensor) -> Tensor:
    """`argmin_l |x - e_l|^2` in float64 from all differences; the lowest index wins a tie.

    A code that is not finite is ignored.

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

    The torch path maximises `x . e'_l - h_l` over the centred codes `e' = e - mean(e)`, where
    `h = |e'|^2 / 2 + mean(e) . e'`; Triton takes a median of codes as centre. This order is that of
    the distances, and rounding stays small where the codes lie close together far from the origin.
    Scores are computed in blocks; no `[N, L]` tensor is allocated. On a CPU, up to 8 rows are
    searched by differences instead. If the scores of two codes differ by rounding only, the result
    of a row may depend on the batch size.

    Args:
        x: vectors, `[N, D]`, any float dtype. Computed in the widest of its dtype, the codebook's
            and float32.
        codebook: codes, `[L, D]`, L >= 1.
        backend: `"auto"`, `"torch"` or `"triton"`.
        precision: `"exact"`, where Triton multiplies two float16 parts of each scaled row, as
            accurate as float32; or `"fast"`, where it multiplies the first parts, as accurate as
            tf32. The torch path is always exact, on a GPU unless
            `torch.set_float32_matmul_precision` was changed.

    Returns:
        int64 `[N]`. The lowest index wins a tie. A row that is not finite gets index 0, as may one
        whose scores overflow. A code that is not finite is ignored.

    Raises:
        ValueError: shapes that do not fit, an empty codebook, an unknown backend or precision.
        TypeError: tensors that are not floating point.
        RuntimeError: the backend cannot run here; under `torch.jit.trace`.

    Examples:
        >>> codebook = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        >>> nearest_code(torch.tensor([[0.9, 0.8], [0.1, 0.2]]), codebook)
        tensor([1, 0])
    """
    _check(x, codebook, precision)
    require("nearest_code", backend, x, codebook)
    run = search_torch if backend == "torch" else search
    return run(x.detach(), codebook.detach(), precision == "fast")


def search_torch(x: Tensor, codebook: Tensor, fast: bool) -> Tensor:
    """Int64 `[N]`; always exact."""
    if is_cpu_readable(x) and len(x) <= _FEW:
        return _search_few(x, codebook)
    dtype = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return _search_many(x, codebook.to(dtype))


search: Callable[..., Tensor] = register(
    "mmvq::nearest_code",
    search_torch,
    gpu="mmvq_kernels.gpu.nearest:search",
    fake=lambda x, _codebook, _fast: x.new_empty(x.shape[0], dtype=torch.long),
)


def take(codebook: Tensor, index: Tensor) -> Tensor:
    """Rows `[N, D]` of a codebook that is about to change.

    In a graph this is an operator, whose result stays. Rows of plain torch code are read when they
    are needed, which inductor (torch 2.11 and 2.13) may take for after the change.
    """
    take_rows = _take if torch.compiler.is_compiling() else _take_torch
    return take_rows(codebook, index)


def _take_torch(codebook: Tensor, index: Tensor) -> Tensor:
    return codebook.index_select(0, index)


_take = register(
    "mmvq::take",
    _take_torch,
    fake=lambda codebook, index: codebook.new_empty(index.shape[0], codebook.shape[1]),
)


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


def _search_many(x: Tensor, codebook: Tensor) -> Tensor:
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


def rounded_mean(codebook: Tensor) -> Tensor:
    """The mean of the codes, rounded to a sixteenth of their spread: `[D]`.

    The step is a power of two. So codes on a lattice stay on one, and equal scores stay equal. All
    NaN if a code is not finite.
    """
    mean = codebook.mean(0)
    spread = (codebook - mean).abs_().amax()
    step = torch.exp2(torch.floor(torch.log2(spread)) - 3)
    return torch.where(step == 0, mean, (mean / step).round() * step)


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
    where, given = "nearest_code", {"x": x, "codebook": codebook}
    if not (x.is_floating_point() and codebook.is_floating_point()):
        rule = "x and codebook must be floating point"
        raise TypeError(message(where, rule, hint="convert with .float()", **given))
    if x.ndim != 2 or codebook.ndim != 2 or x.shape[1] != codebook.shape[1]:
        rule = "x must be [N, D] and codebook [L, D], with the same D"
        hint = "use x.reshape(-1, D), or mmvq.functional.nearest_code, which takes [..., D]"
        raise ValueError(message(where, rule, hint=hint, **given))
    if codebook.numel() == 0:
        hint = "build the codebook with at least one code of at least one dimension"
        raise ValueError(message(where, "codebook must not be empty", hint=hint, codebook=codebook))
    if precision not in _PRECISIONS:
        hint = 'leave it at "exact" unless an occasional wrong code is acceptable'
        rule = 'precision must be "exact" or "fast"'
        raise ValueError(message(where, rule, hint=hint, precision=precision))
