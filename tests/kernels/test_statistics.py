"""Counts and sums against the reference, one row at a time.

ATOL: a sum of at most N values in [-1, 1]: N roundings of N.
"""

from __future__ import annotations

import pytest
import torch
from kernels.draws import G, assignments
from support import DTYPES, close, rounding, strided, wide

from mmvq_kernels import code_statistics
from mmvq_kernels.statistics import code_statistics_ref

SIZES = [(1, 1, 1), (63, 1, 8), (97, 101, 13), (257, 40, 3), (0, 5, 3), (16_385, 7, 2)]


@pytest.mark.parametrize(("N", "L", "D"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(N: int, L: int, D: int, dtype: torch.dtype) -> None:
    values, indices, groups = assignments(N, L, D, dtype=dtype)
    n, s = code_statistics_ref(values, indices, L)
    counts, sums = code_statistics(values, indices, L)
    assert counts.dtype == sums.dtype == wide(dtype)
    assert torch.equal(counts.double(), n)
    close(sums, s, rounding(wide(dtype), N, N))
    assert counts.sum() == (indices >= 0).sum()

    by_group, joint = code_statistics(values, indices, L, groups=groups, num_groups=G)
    assert by_group.shape == (G, L)
    for g in range(G):
        mine = groups == g
        assert torch.equal(
            by_group[g].double(), code_statistics_ref(values[mine], indices[mine], L)[0]
        )
    assert torch.equal(joint, sums)


def test_left_out_rows_are_not_read() -> None:
    values, indices, groups = assignments(50, 7, 4)
    expected = code_statistics(values, indices, 7, groups=groups, num_groups=G)
    values[indices < 0] = torch.nan
    out = code_statistics(values, indices, 7, groups=groups, num_groups=G)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    nobody = code_statistics(values, torch.full((50,), -1), 7)
    assert all((x == 0).all() for x in nobody)


def test_same_bits_for_repetition_and_strides() -> None:
    values, indices, _ = assignments(257, 5, 16)
    expected = code_statistics(values, indices, 5)
    for again in (
        code_statistics(values, indices, 5),
        code_statistics(strided(values), indices, 5),
        code_statistics(values.clone().requires_grad_(), indices, 5, backend="torch"),
    ):
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
        assert not any(x.requires_grad for x in again)


def test_counts_beyond_what_float32_can_count() -> None:
    """2^24 + 3 ones added in float32 stay at 2^24; the nearest float32 is 2^24 + 4."""
    N = 2**24 + 3
    values, indices = torch.zeros(N, 0), torch.zeros(N, dtype=torch.long)
    indices[0] = -1
    assert code_statistics(values, indices, 2)[0].tolist() == [2**24 + 2, 0]
    indices[0] = 0
    groups = torch.zeros_like(indices)
    by_group, _ = code_statistics(values, indices, 2, groups=groups, num_groups=2)
    assert by_group.tolist() == [[2**24 + 4, 0], [0, 0]]


def test_the_error_of_a_sum_does_not_grow_with_its_length() -> None:
    """One by one in float32, a million of 0.1 is off by 0.9%; here by the last rounding."""
    N = 10**6
    values = torch.full((N, 1), 0.1)
    _, sums = code_statistics(values, torch.ones(N, dtype=torch.long), 3)
    exact = N * values[0].double()
    # N roundings in float64 and one in float32
    limit = rounding(torch.float64, N, float(exact)) + rounding(torch.float32, 1, float(exact))
    close(sums[:, 0], torch.tensor([0.0, float(exact), 0.0]), limit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_values_do_not_saturate(dtype: torch.dtype) -> None:
    """A count past 2^8 and 2^11, a sum past 65,504: neither fits the narrow dtypes."""
    values = torch.full((5000, 1), 32.0, dtype=dtype)
    counts, sums = code_statistics(values, torch.zeros(5000, dtype=torch.long), 2)
    assert counts.tolist() == [5000, 0]
    assert sums.tolist() == [[160_000], [0]]
