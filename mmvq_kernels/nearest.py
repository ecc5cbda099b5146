"""Nearest code (Eq. 2): `argmin_l |x - e_l|`. Reference, torch path, operator.

The Triton kernel is in `mmvq_kernels/gpu/nearest.py`, which only a GPU imports.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from mmvq_kernels import narrow
from mmvq_kernels.backends import Backend, require
from mmvq_kernels.checks import is_cpu_readable
from mmvq_kernels.hashing import first_equal_row
from mmvq_kernels.messages import message
from mmvq_kernels.operators import register
from mmvq_kernels.products import by_onednn, matmul_t

_FEW = 8  # vectors on a CPU for which to prepare the codes would be most of the work
_TILE = 1024  # codes in a block of scores, if they have many columns
_ROWS = 48  # vectors in a block, at least
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

    The torch path maximises `x . e'_l - h_l` over the codes about a centre, `e' = e - c`, where
    `h = |e'|^2 / 2 + c . e'` and c is the median of three codes, element by element. This order is
    that of the distances, and rounding stays small where the codes lie close together far from the
    origin. Triton moves x to the centre too. Scores are computed in blocks; no `[N, L]` tensor is
    allocated. On a CPU, up to 8 rows are searched by differences instead. If the scores of two
    codes differ by rounding only, the result of a row may depend on the batch size.

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
    index = _search_tiles(x, codebook, None) if is_cpu_readable(codebook) else None
    if index is None:
        index = _search_tiles(x, codebook, _substitutes(codebook))
        assert index is not None
    return index


def _search_tiles(x: Tensor, codebook: Tensor, substitutes: Tensor | None) -> Tensor | None:
    """Tiles of codes against blocks of rows; one block of scores exists at a time.

    Without `substitutes`, None at the first tile with a code that is not finite.
    """
    if substitutes is not None:
        codebook = codebook[substitutes]
    N, (L, D) = x.shape[0], codebook.shape
    search, number = _best, 1
    tile = min(L, _TILE if D > 16 else 2 * _TILE + 16)  # not 2,048: its rows meet in a cache
    if narrow.takes(x, codebook):
        search, tile = narrow.best, min(L, 8 * _TILE)  # 256 KB, in the second cache
    else:
        room = _BLOCK_BYTES * (1 if x.device.type == "cpu" else 32)
        number = math.ceil(N * tile * codebook.element_size() / room)
    number = max(1, min(number, N // _ROWS))
    centre, scorers = _centre(codebook), codebook.new_empty(tile, D)
    best, index, biases = x, x, []
    for start in range(0, L, tile):
        codes = codebook.narrow(0, start, min(tile, L - start))
        centred = torch.sub(codes, centre, out=scorers.narrow(0, 0, len(codes)))
        bias = (codes + centre).mul_(centred).sum(1).mul_(-0.5)  # -(|e'|^2 / 2 + centre . e')
        if substitutes is not None:
            bias = bias.nan_to_num(-torch.inf, torch.inf, -torch.inf)
        elif not np.isfinite(bias.numpy()).all():
            return None
        biases.append(bias)
        # made before the blocks of scores, whose memory then comes free as a whole
        score, code = bias.new_empty(N), bias.new_empty(N, dtype=torch.long)
        for block in zip(*(t.tensor_split(number) for t in (x, score, code)), strict=True):
            search(block[0], centred, bias, *block[1:])
        if start:
            code = torch.where(score > best, code + start, index)
            score = torch.maximum(score, best)  # keeps a NaN
        best, index = score, code
    first = _first_of_equals(codebook, biases[0] if len(biases) == 1 else torch.cat(biases))
    for replace in (first, substitutes):
        if replace is not None:
            index = replace[index]
    return torch.where(best.isfinite(), index, 0)


def _substitutes(codebook: Tensor) -> Tensor:
    """Of each code its own index, of one that is not finite that of the first finite one: `[L]`."""
    finite = codebook.isfinite().all(1)
    own = torch.arange(len(codebook), device=codebook.device)
    return torch.where(finite, own, finite.int().argmax())


def _centre(codebook: Tensor) -> Tensor:
    """The median of the first, middle and last code, element by element: `[D]`.

    It lies among the codes wherever one of them is, and on the lattice of codes on a lattice, whose
    scores are exact.
    """
    a, b, c = codebook[0], codebook[len(codebook) // 2], codebook[-1]
    return torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))


def _best(x: Tensor, codes: Tensor, bias: Tensor, score: Tensor, code: Tensor) -> None:
    """Write the greatest score `x . e' - h` of each row, or its NaN, and the lowest index of it.

    On a CPU, they do not depend on the other rows.
    """
    N, x = len(x), x.to(codes.dtype)
    if x.device.type == "cpu" and not by_onednn(x):  # BLAS rounds edges in another way
        odd = codes.shape[1] % 2
        x, codes = pad(x, (0, odd, 0, -N % _ROWS)), pad(codes, (0, odd))
    scores = matmul_t(x, codes, bias)[:N]
    if is_cpu_readable(scores):
        scores.numpy().argmax(1, out=code.numpy())  # vectorised; that of torch is not
        torch.gather(scores, 1, code[:, None], out=score[:, None])
    else:
        for result, to in zip(scores.max(1), (score, code), strict=True):
            to.copy_(result)


def _first_of_equals(codebook: Tensor, biases: Tensor) -> Tensor | None:
    """Of each code the lowest index of an equal one, `[L]`; None if all are known to differ.

    The scores of equal codes may differ by rounding. Their biases do not, unless torch shares the
    columns of one code among threads.
    """
    if not is_cpu_readable(biases) or codebook.shape[1] >= 1 << 15:
        return first_equal_row(codebook)
    values = biases.numpy()
    order = values.argsort()
    again = values[order[1:]] == values[order[:-1]]
    if not again.any():
        return None
    twins = torch.from_numpy(np.union1d(order[1:][again], order[:-1][again]))
    first = torch.arange(len(codebook))
    first[twins] = twins[first_equal_row(codebook[twins])]
    return first


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
