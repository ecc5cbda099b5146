"""Counts and sums of a batch for each code: the brackets of Eq. 7."""

from __future__ import annotations

from torch import Tensor

from mmvq_kernels import code_statistics
from mmvq_kernels.statistics import code_statistics_ref

__all__ = ["code_statistics", "code_statistics_ref", "finite_rows"]


def finite_rows(x: Tensor) -> Tensor:
    """Which vectors may enter the statistics: `x.isfinite().all(-1)` for `[..., D]`, D >= 1.

    In an eighth of the time: the largest and the smallest element both keep a NaN.
    """
    return x.amax(-1).isfinite() & x.amin(-1).isfinite()
