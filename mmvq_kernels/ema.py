"""The exponential moving average of a codebook (Eq. 7), written in place.

The Triton kernels are in `mmvq_kernels/gpu/ema.py`, which only a GPU imports.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmvq_kernels.backends import Backend, require, runs_triton, through_operator
from mmvq_kernels.messages import message
from mmvq_kernels.rounding import FADED


def ema_update_(
    codes: Tensor,
    sums: Tensor,
    counts: Tensor,
    batch_sums: Tensor,
    batch_counts: Tensor,
    *,
    decay: float,
    eps: float = 1e-5,
    dead: Tensor | None = None,
    replacement: Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """One step of the moving average, reset of dead codes included, in place (Eq. 7).

        N <- decay N + (1 - decay) n            o <- decay o + (1 - decay) s
        e <- o / smoothed(N)                    smoothed(N) = (N + eps) / (sum N + L eps) * sum N

    Smoothing happens in the division only; N and o keep their plain averages. A code that no vector
    chose keeps its `e`: its o and N fade alike, and smoothing alone would move it towards zero. A
    dead code takes `replacement` as its `e`, the mean N of the dead codes as its N, and
    `o = e smoothed(N)`: the total mass does not change, so that no living code moves. Where that
    mean has faded to 1000 eps or less, N is 1 - decay at least, as if one vector had chosen the
    code: otherwise the first vector to choose it would replace it. A batch without a single vector
    (`batch_counts` all zero) leaves everything as it was.

    Args:
        codes: `e`, `[L, D]`, written.
        sums: `o`, `[L, D]`, written.
        counts: `N`, `[L]`, written.
        batch_sums: `s`, `[L, D]`, from `code_statistics`.
        batch_counts: `n`, `[L]`.
        decay: gamma in [0, 1].
        eps: Laplace smoothing.
        dead: bool `[L]`, the codes to replace.
        replacement: `[L, D]`, read where `dead`.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Raises:
        ValueError: shapes that do not fit, or only one of `dead` and `replacement`.
        RuntimeError: the backend cannot run here.

    Examples:
        >>> codes, sums, counts = torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1)
        >>> ema_update_(codes, sums, counts, torch.ones(1, 2), torch.ones(1), decay=0.75)
        >>> codes
        tensor([[0.2500, 0.2500]])
    """
    _check(codes, sums, counts, batch_sums, batch_counts, dead, replacement)
    state, batch, reset = (codes, sums, counts), (batch_sums, batch_counts), (dead, replacement)
    require("ema_update_", backend, *state, *batch, *reset)
    rest: tuple[Any, ...] = *batch, decay, eps, *reset
    # A compiled graph holds the formula itself: inductor lets reads slip behind an operator that
    # writes (torch 2.13: a code that was read before the update came out as it was after), and an
    # operator would take each value of `decay` for a constant.
    traced = torch.compiler.is_dynamo_compiling()
    with torch.no_grad():
        if through_operator(backend, codes) and not traced:
            _ema_update(*state, *rest)
        else:
            _ema_update_torch(*state, *rest)


@torch.library.custom_op("mmvq::ema_update_", mutates_args=("codes", "sums", "counts"))
def _ema_update(
    codes: Tensor,
    sums: Tensor,
    counts: Tensor,
    batch_sums: Tensor,
    batch_counts: Tensor,
    decay: float,
    eps: float,
    dead: Tensor | None,
    replacement: Tensor | None,
) -> None:
    _ema_update_torch(codes, sums, counts, batch_sums, batch_counts, decay, eps, dead, replacement)


@_ema_update.register_kernel("cuda")
def _(
    codes: Tensor,
    sums: Tensor,
    counts: Tensor,
    batch_sums: Tensor,
    batch_counts: Tensor,
    decay: float,
    eps: float,
    dead: Tensor | None,
    replacement: Tensor | None,
) -> None:
    args = codes, sums, counts, batch_sums, batch_counts, decay, eps, dead, replacement
    if not runs_triton(codes, sums, counts, batch_sums, batch_counts, dead, replacement):
        return _ema_update_torch(*args)
    from mmvq_kernels.gpu.ema import update_

    return update_(*args)


@_ema_update.register_fake
def _(
    codes: Tensor,
    sums: Tensor,
    counts: Tensor,
    batch_sums: Tensor,
    batch_counts: Tensor,
    decay: float,
    eps: float,
    dead: Tensor | None,
    replacement: Tensor | None,
) -> None:
    return None


def _ema_update_torch(
    codes: Tensor,
    sums: Tensor,
    counts: Tensor,
    batch_sums: Tensor,
    batch_counts: Tensor,
    decay: float,
    eps: float,
    dead: Tensor | None,
    replacement: Tensor | None,
) -> None:
    batch_counts, batch_sums = batch_counts.to(counts.dtype), batch_sums.to(sums.dtype)
    chosen = batch_counts > 0
    some = chosen.any()
    keep = torch.where(some, counts.new_ones(()) * decay, 1.0)
    counts.mul_(keep).addcmul_(batch_counts, 1 - keep)
    sums.mul_(keep).addcmul_(batch_sums, 1 - keep)
    total = counts.sum()
    if dead is not None and replacement is not None:
        dead = dead & some
        mean = (counts * dead).sum() / dead.sum().clamp(min=1)
        mass = torch.where(mean > FADED * eps, mean, torch.maximum(mean, 1 - keep))
        total = total + (mass - mean) * dead.sum()
        counts.copy_(torch.where(dead, mass, counts))
    smoothed = (counts + eps) / (total + counts.numel() * eps) * total  # [L]
    if dead is not None and replacement is not None:
        revived = replacement.to(sums.dtype) * smoothed[:, None]
        torch.where(dead[:, None], revived, sums, out=sums)
    moved = chosen if dead is None else chosen | dead
    moved = (moved & (smoothed > 0))[:, None]  # with eps = 0, a dead code may have no mass at all
    torch.where(moved, sums / smoothed[:, None], codes, out=codes)


def _check(
    codes: Tensor,
    sums: Tensor,
    counts: Tensor,
    batch_sums: Tensor,
    batch_counts: Tensor,
    dead: Tensor | None,
    replacement: Tensor | None,
) -> None:
    fits = codes.ndim == 2 and sums.shape == batch_sums.shape == codes.shape
    if not fits or not counts.shape == batch_counts.shape == codes.shape[:1]:
        raise ValueError(
            message(
                "ema_update_",
                "codes, sums and batch_sums must be [L, D], counts and batch_counts [L]",
                hint="take the batch's from code_statistics(values, indices, num_codes=L)",
                codes=codes,
                sums=sums,
                batch_sums=batch_sums,
                counts=counts,
                batch_counts=batch_counts,
            )
        )
    shapes = (
        None if dead is None else dead.shape,
        None if replacement is None else replacement.shape,
    )
    if shapes not in ((None, None), (counts.shape, codes.shape)):
        raise ValueError(
            message(
                "ema_update_",
                "dead [L] and replacement [L, D] must be given together",
                hint="give both to reset codes, neither to keep all",
                codes=codes,
                dead=dead,
                replacement=replacement,
            )
        )
