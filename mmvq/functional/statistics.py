"""Counts and sums of a batch per code: the bracketed terms of Eq. 7."""

from __future__ import annotations

from torch import Tensor

from mmvq_kernels import code_statistics
from mmvq_kernels.statistics import code_statistics_ref, largest_fit

__all__ = ["code_statistics", "code_statistics_ref", "finite_rows"]


def finite_rows(x: Tensor) -> Tensor:
    """Which vectors are finite and may enter the statistics: `[..., D]`, D >= 1 -> bool `[...]`.

    Vectors with an element beyond 1e15 (8e149 in float64) may not.

    Examples:
        >>> finite_rows(torch.tensor([[0.0, 1.0], [0.0, torch.nan], [1e20, 0.0]]))
        tensor([ True, False, False])
    """
    limit = largest_fit(x.dtype)
    # 8 times faster than x.abs() <= limit; amax and amin both propagate NaN.
    return x.amax(-1).le(limit) & x.amin(-1).ge(-limit)
