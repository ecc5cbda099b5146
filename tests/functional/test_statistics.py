"""`functional.code_statistics` is the kernel's, and its reference is the definition."""

from __future__ import annotations

import pytest
import torch
from support import DTYPES, wide

import mmvq_kernels
from mmvq.functional import code_statistics, code_statistics_ref, finite_rows


def test_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    indices = torch.tensor([2, 0, -1, 2])
    counts, sums = (
        torch.tensor([1.0, 0.0, 2.0]),
        torch.tensor([[3.0, 4.0], [0.0, 0.0], [8.0, 10.0]]),
    )
    for statistics in (code_statistics, code_statistics_ref):
        n, s = statistics(values, indices, 3)
        assert torch.equal(n.float(), counts)
        assert torch.equal(s.float(), sums)
    assert code_statistics is mmvq_kernels.code_statistics


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_rows_leave_room_for_sums_of_squares(dtype: torch.dtype) -> None:
    """2^25 squares of differences of the largest elements let in; float16 has no larger ones."""
    largest = torch.finfo(wide(dtype)).max
    limit = largest**0.5 / 2**14
    assert 2**25 * (2 * limit) ** 2 <= largest
    x = torch.tensor([[0.99 * limit, 0.0], [0.0, -0.99 * limit], [1.01 * limit, 0.0]]).double()
    x = torch.cat([x, -x, torch.tensor([[0.0, 1e-300]]).double()]).to(dtype)
    allowed = [True, True, False, True, True, False, True]
    assert finite_rows(x).tolist() == (x.isfinite().all(1) & torch.tensor(allowed)).tolist()


def test_finite_rows_are_those_without_nan_or_infinity() -> None:
    x = torch.randn(4, 5, 3)
    x[0, 0, 1], x[1, 2, 0], x[3, 4, 2] = torch.nan, torch.inf, -torch.inf
    assert torch.equal(finite_rows(x), x.isfinite().all(-1))
    assert finite_rows(torch.empty(0, 3)).shape == (0,)
