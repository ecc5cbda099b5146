"""Counts and sums of a batch for each code: the brackets of Eq. 7."""

from __future__ import annotations

import torch
from torch import Tensor

from mmvq_kernels import code_statistics
from mmvq_kernels.statistics import code_statistics_ref

__all__ = ["code_statistics", "code_statistics_ref", "finite_rows"]


def finite_rows(x: Tensor) -> Tensor:
    """Which vectors may enter the statistics: those `[..., D]`, D >= 1, that are finite.

    Out are also vectors with an element beyond 1e15 (8e149 in float64), that is, the root of the
    largest number over 2^14: sums of 2^25 squares of differences of such elements are finite.

    Examples:
        >>> finite_rows(torch.tensor([[0.0, 1.0], [0.0, torch.nan], [1e20, 0.0]]))
        tensor([ True, False, False])
    """
    widest = torch.finfo(torch.promote_types(x.dtype, torch.float32)).max
    limit = min(torch.finfo(x.dtype).max, widest**0.5 / 2**14)
    # An eighth of the time of x.abs() <= limit: the largest and the smallest both keep a NaN.
    return x.amax(-1).le(limit) & x.amin(-1).ge(-limit)
