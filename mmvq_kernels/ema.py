"""The exponential moving average of a codebook (Eq. 7), written in place.

The Triton kernels are in `mmvq_kernels/gpu/ema.py`, which only a GPU imports.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmvq_kernels.backends import Backend, require
from mmvq_kernels.messages import message
from mmvq_kernels.operators import register

FADED = 1000  # times eps: an N above it is large enough not to shrink the code by smoothing
# Of the codebook's spread, for each unit of a random 24-bit integer: enough to separate two codes
# that share a donor.
JITTER = 0.01 / 2**23


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
    """One step of the moving average, including the reset of dead codes, in place (Eq. 7).

        N <- decay N + (1 - decay) n            o <- decay o + (1 - decay) s
        e <- o / smoothed(N)                    smoothed(N) = (N + eps) / (sum N + L eps) * sum N

    Smoothing is used in the division only; N and o keep their plain averages. A code that no vector
    chose keeps its `e`: its o and N shrink by the same factor, and smoothing alone would move it
    towards zero. A dead code takes `replacement` as its `e`, the mean N of the dead codes as its N,
    and `o = e smoothed(N)`. The sum of N does not change, so the other codes do not move. If that
    mean has shrunk to 1000 eps or less, N is at least 1 - decay, as if one vector had chosen the
    code. Otherwise the first vector to choose the code would replace it. A batch without any vector
    (`batch_counts` all zero) changes nothing.

    Args:
        codes: codes `e`, `[L, D]`, updated.
        sums: moving sums `o`, `[L, D]`, updated.
        counts: moving counts `N`, `[L]`, updated.
        batch_sums: sums `s` of the batch, `[L, D]`, from `code_statistics`.
        batch_counts: counts `n` of the batch, `[L]`.
        decay: decay gamma, in [0, 1].
        eps: constant of the Laplace smoothing.
        dead: codes to replace, bool `[L]`.
        replacement: new codes, `[L, D]`; read only where `dead`.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Raises:
        ValueError: shapes that do not fit, or only one of `dead` and `replacement`.
        TypeError: a state that is not floating point or of several dtypes, a `dead` that is not
            bool.
        RuntimeError: the backend cannot run here.

    Examples:
        >>> codes, sums, counts = torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1)
        >>> ema_update_(codes, sums, counts, torch.ones(1, 2), torch.ones(1), decay=0.75)
        >>> codes
        tensor([[0.2500, 0.2500]])
    """
    where = "ema_update_"
    matrices = {"codes": codes, "sums": sums, "batch_sums": batch_sums}
    vectors = {"counts": counts, "batch_counts": batch_counts}
    fits = codes.ndim == 2 and all(x.shape == codes.shape for x in matrices.values())
    if not fits or any(x.shape != codes.shape[:1] for x in vectors.values()):
        rule = "codes, sums and batch_sums must be [L, D], counts and batch_counts [L]"
        hint = "take the batch's from code_statistics(values, indices, num_codes=L)"
        raise ValueError(message(where, rule, hint=hint, **matrices, **vectors))
    reset = dead, replacement
    shapes = [None if x is None else x.shape for x in reset]
    if shapes not in ([None, None], [counts.shape, codes.shape]):
        rule = "dead [L] and replacement [L, D] must be given together"
        hint = "give both to reset codes, neither to keep all"
        given = {"codes": codes, "dead": dead, "replacement": replacement}
        raise ValueError(message(where, rule, hint=hint, **given))
    state = codes, sums, counts
    floats = all(x.is_floating_point() and x.dtype == codes.dtype for x in state)
    if not floats or (dead is not None and dead.dtype != torch.bool):
        rule = "codes, sums and counts must be floating point, of one dtype, and dead bool"
        hint = "convert them with .float(), and dead with .bool()"
        got = {"codes": codes, "sums": sums, "counts": counts, "dead": dead}
        raise TypeError(message(where, rule, hint=hint, **got))
    require(where, backend, *matrices.values(), *vectors.values(), *reset)
    run = update_torch_ if backend == "torch" else update_
    with torch.no_grad():
        run(codes, sums, counts, batch_sums, batch_counts, decay, eps, *reset)


def update_torch_(
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
    """The formula of `ema_update_`."""
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


update_: Callable[..., None] = register(
    "mmvq::ema_update_",
    update_torch_,
    gpu="mmvq_kernels.gpu.ema:update_",
    mutates_args=("codes", "sums", "counts"),
)
