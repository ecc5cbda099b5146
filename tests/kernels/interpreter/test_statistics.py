"""The statistics kernels against the reference, one row at a time.

ATOL: a sum of at most N values in [-1, 1]: N roundings of N.
"""

from __future__ import annotations

import pytest
import torch
from kernels.draws import G, assignments
from support import close, rounding, strided

from mmvq_kernels.gpu import statistics
from mmvq_kernels.gpu.statistics import accumulate
from mmvq_kernels.statistics import code_statistics_ref

# one row, one code, more codes than rows, primes, more than one tile of columns, no row
SIZES = [(1, 1, 1), (63, 1, 8), (5, 30, 4), (97, 101, 13), (401, 11, 131), (0, 5, 3)]
SIZES += [(9, 3, 1024), (3, 130, 4)]  # wide rows, many codes
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
WAYS = pytest.mark.parametrize("deterministic", [True, False])


@pytest.mark.parametrize(("N", "L", "D"), SIZES)
@DTYPES
@WAYS
def test_equals_the_reference(
    N: int,
    L: int,
    D: int,
    dtype: torch.dtype,
    deterministic: bool,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "_CHUNK", 32)  # code 0 has several chunks, the last one short
    values, indices, groups = assignments(N, L, D, device, dtype)
    n, s = code_statistics_ref(values, indices, L)
    counts, sums = accumulate(values, indices, L, None, 1, deterministic)
    assert counts.shape == (1, L)
    assert counts.dtype == sums.dtype == torch.float32
    assert torch.equal(counts[0].double(), n)
    close(sums.cpu(), s.cpu(), rounding(torch.float32, N, N))
    by_group, joint = accumulate(values, indices, L, groups, G, deterministic)
    assert by_group.shape == (G, L)
    for g in range(G):
        of_group = torch.where(groups == g, indices, -1)
        assert torch.equal(by_group[g].double(), code_statistics_ref(values, of_group, L)[0])
    close(joint.cpu(), s.cpu(), rounding(torch.float32, N, N))


@WAYS
def test_left_out_rows_are_not_read(deterministic: bool, device: str) -> None:
    values, indices, groups = assignments(150, 7, 4, device)
    values[indices < 0] = torch.nan
    counts, sums = accumulate(values, indices, 7, groups, G, deterministic)
    assert sums.isfinite().all()
    assert counts.sum() == (indices >= 0).sum()
    nobody = torch.full_like(indices, -1)
    for out in accumulate(values, nobody, 7, groups, G, deterministic):
        assert (out == 0).all()


def test_same_bits_for_repetition_and_strides(device: str) -> None:
    values, indices, groups = assignments(700, 5, 16, device)
    counts, sums = accumulate(values, indices, 5, groups, G, True)
    for again in (values, strided(values)):
        other_counts, other_sums = accumulate(
            again, torch.stack([indices, indices], 1)[:, 0], 5, groups, G, True
        )
        assert torch.equal(other_counts, counts)
        assert torch.equal(other_sums, sums)


def test_narrow_values_do_not_saturate(device: str) -> None:
    values = torch.full((5000, 1), 32.0, dtype=torch.bfloat16, device=device)
    indices = torch.zeros(5000, dtype=torch.long, device=device)
    counts, sums = accumulate(values, indices, 2, None, 1, True)
    assert counts.tolist() == [[5000, 0]]
    assert sums.tolist() == [[160_000], [0]]
