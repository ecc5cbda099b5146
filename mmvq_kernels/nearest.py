"""Nearest code (Eq. 2): `argmin_l |x - e_l|`. Reference, torch path, operator.

The Triton kernel is in `mmvq_kernels/gpu/nearest.py`, which only a GPU imports.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from mmvq_kernels.backends import Backend, require, runs_triton, through_operator
from mmvq_kernels.hashing import repeats_an_earlier_row
from mmvq_kernels.messages import message

_BLOCK_BYTES = (
    1 << 22
)  # scores held at a time: large enough for the matrix product, small for cache

Precision = Literal["exact", "fast"]


def nearest_code_ref(x: Tensor, codebook: Tensor) -> Tensor:
    """`argmin_l |x - e_l|^2` in float64, every difference written out; the lowest index on ties."""
    x, codebook = x.double(), codebook.double()
    return (x[:, None] - codebook).square().sum(-1).argmin(-1)


def nearest_code(
    x: Tensor,
    codebook: Tensor,
    *,
    backend: Backend = "auto",
    precision: Precision = "exact",
) -> Tensor:
    """Index of the code nearest to each row: `argmin_l |x - e_l|^2` (Eq. 2).

    The search minimises `h_l - x . e'_l` over centred codes `e' = e - mean(e)`, with
    `h = |e'|^2 / 2 + mean(e) . e'`: the same order as the distance, no `|x|^2`, no clamp, and exact
    for codebooks far from the origin. Scores are made in blocks; no `[N, L]` tensor exists.

    Args:
        x: vectors, `[N, D]`, any float dtype. Computed in the wider of its dtype, the codebook's
            and float32.
        codebook: codes, `[L, D]`, L >= 1.
        backend: `"auto"`, `"torch"` or `"triton"`.
        precision: `"exact"` (Triton multiplies in tf32x3, as near as float32), or `"fast"`: on a
            GPU tf32 products, bf16 ones for a bfloat16 `x` (the torch path is always exact).

    Returns:
        int64 `[N]`. Ties go to the lowest index. A row whose scores are not finite (NaN, Inf or
        overflow) gets index 0.

    Raises:
        ValueError: shapes that do not fit, an empty codebook, an unknown backend or precision.
        TypeError: tensors that are not floating point.
        RuntimeError: the backend cannot run here.
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


def _search_torch(x: Tensor, codebook: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return _nearest_code_torch(x.to(dtype), codebook.to(dtype))


def _nearest_code_torch(x: Tensor, codebook: Tensor) -> Tensor:
    mean = codebook.mean(0)  # [D]
    codes = codebook - mean  # [L, D]
    half_norm = codes.square().sum(1) / 2 + codes @ mean  # [L]
    half_norm.masked_fill_(repeats_an_earlier_row(codebook), torch.inf)  # the lowest index wins
    rows = max(1, _BLOCK_BYTES // (half_norm.numel() * x.element_size()))
    indices = x.new_empty(x.shape[0], dtype=torch.long)
    for block, out in zip(x.split(rows), indices.split(rows), strict=True):
        scores = torch.addmm(half_norm, block, codes.T, alpha=-1)  # [rows, L]
        best = scores.argmin(1, keepdim=True)
        out.copy_(torch.where(scores.gather(1, best).isfinite(), best, 0).squeeze(1))
    return indices


def _check(x: Tensor, codebook: Tensor, precision: str) -> None:
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
    if codebook.shape[0] == 0:
        raise ValueError(
            message(
                "nearest_code",
                "codebook must hold at least one code",
                hint="build the codebook with size >= 1",
                codebook=codebook,
            )
        )
    if precision not in get_args(Precision):
        raise ValueError(
            message(
                "nearest_code",
                'precision must be "exact" or "fast"',
                hint='leave it at "exact" unless a wrong code now and then is fine',
                precision=precision,
            )
        )
