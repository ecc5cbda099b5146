"""`functional.code_statistics` is the kernel's, and its reference is the definition."""

from __future__ import annotations

import torch

import mmvq_kernels
from mmvq import functional as F


def test_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    indices = torch.tensor([2, 0, -1, 2])
    counts, sums = (
        torch.tensor([1.0, 0.0, 2.0]),
        torch.tensor([[3.0, 4.0], [0.0, 0.0], [8.0, 10.0]]),
    )
    for statistics in (F.code_statistics, F.code_statistics_ref):
        n, s = statistics(values, indices, 3)
        assert torch.equal(n.float(), counts)
        assert torch.equal(s.float(), sums)
    assert F.code_statistics is mmvq_kernels.code_statistics


def test_finite_rows_are_those_without_nan_or_infinity() -> None:
    x = torch.randn(4, 5, 3)
    x[0, 0, 1], x[1, 2, 0], x[3, 4, 2] = torch.nan, torch.inf, -torch.inf
    assert torch.equal(F.finite_rows(x), x.isfinite().all(-1))
    assert F.finite_rows(torch.empty(0, 3)).shape == (0,)
