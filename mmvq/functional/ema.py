"""The multi-modal moving average of the codebook (Eq. 7)."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmvq.functional.reset import advance_ages, dead_codes, replacement_codes
from mmvq_kernels import ema, ema_update_, statistics
from mmvq_kernels.checks import is_cpu_readable
from mmvq_kernels.operators import register

__all__ = ["ema_update_", "ema_update_ref", "laplace_smoothing"]


def laplace_smoothing(counts: Tensor, eps: float) -> Tensor:
    r"""$\tilde N_i = \frac{N_i + \epsilon}{\sum_j N_j + L \epsilon} \sum_j N_j$, `[L]`.

    The total is kept, and no entry is zero. Source: van den Oord et al. 2017, App. A.1, as commonly
    implemented. The paper has none. The released code writes the result back into N at each step.

    Examples:
        >>> laplace_smoothing(torch.tensor([4.0, 0.0]), eps=1.0)
        tensor([3.3333, 0.6667])
    """
    total = counts.sum()
    return (counts + eps) / (total + counts.numel() * eps) * total


def ema_update_ref(
    sums: Tensor,
    counts: Tensor,
    batch_sums: Tensor,
    batch_counts: Tensor,
    *,
    decay: float,
    eps: float = 1e-5,
    codes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Eq. 7 without reset, out of place; returns the new `(codes, sums, counts)`.

    Args:
        sums: sums o, `[L, D]`.
        counts: counts N, `[L]`.
        batch_sums: sums of the batch, `[L, D]`.
        batch_counts: counts of the batch, `[L]`.
        decay: decay gamma of the moving average.
        eps: constant of the Laplace smoothing.
        codes: codes before the step, which a code keeps if no vector chose it. None: every code is
            computed from its sum.

    Examples:
        >>> sums, counts = torch.zeros(1, 2), torch.ones(1)
        >>> codes, _, _ = ema_update_ref(sums, counts, torch.ones(1, 2), counts, decay=0.75)
        >>> codes
        tensor([[0.2500, 0.2500]])
    """
    counts = decay * counts + (1 - decay) * batch_counts
    sums = decay * sums + (1 - decay) * batch_sums
    new = sums / laplace_smoothing(counts, eps)[:, None]
    if codes is not None:
        new = torch.where(batch_counts[:, None] > 0, new, codes)
    return new, sums, counts


def step_torch_(
    codes: Tensor,
    sums: Tensor,
    counts: Tensor,
    ages: Tensor,
    usage: Tensor,
    steps: Tensor,
    batch: Tensor,
    decay: float,
    eps: float,
    reset_after: float | None,
    reset_rule: str,
    update_from: typing.Sequence[int] | None,
) -> None:
    """One step of the whole state of an `EMACodebook`, in place: Eq. 7 and the reset of Sec. 4.3.

    `batch` is what `statistics.accumulate` returns. Only groups in `update_from` move the codes.
    """
    n, s = statistics.split(batch, len(ages), *codes.shape)
    usage.add_(n.long())
    ages.copy_(advance_ages(ages, n))
    if update_from is None:
        own_ages, joint = ages, n.sum(0)
    else:
        own_ages, joint = (torch.stack([x[g] for g in update_from]) for x in (ages, n))
        joint = joint.sum(0)
    reset: tuple[Tensor, Tensor] | tuple[None, None] = None, None
    if reset_after is not None:
        rule: Any = reset_rule  # an operator's schema knows no Literal
        dead = dead_codes(own_ages, reset_after, rule) & (joint.sum() > 0)
        if not is_cpu_readable(dead) or dead.numpy().any():  # a GPU would have to be waited for
            ages.masked_fill_(dead & (ages >= 0), 0)
            reset = dead, replacement_codes(codes, dead, s, joint, steps)
    ema.update_(codes, sums, counts, s, joint, decay, eps, *reset)
    steps.add_(1)


step_: Callable[..., None] = register(
    "mmvq::update_codebook_",
    step_torch_,
    gpu="mmvq_kernels.gpu.ema:step_",
    mutates_args=("codes", "sums", "counts", "ages", "usage", "steps"),
)
