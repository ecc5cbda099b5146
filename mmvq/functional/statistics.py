"""Counts and sums of a batch for each code: the brackets of Eq. 7."""

from __future__ import annotations

from mmvq_kernels import code_statistics
from mmvq_kernels.statistics import code_statistics_ref

__all__ = ["code_statistics", "code_statistics_ref"]
