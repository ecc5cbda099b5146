"""The multi-modal moving average of the codebook (Eq. 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from mmvq_kernels import ema_update_

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
