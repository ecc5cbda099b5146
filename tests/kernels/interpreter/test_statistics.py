"""The statistics kernels against the reference, one row at a time.

ATOL: a sum of at most N values in [-1, 1]: N roundings of N.
"""

from __future__ import annotations

import pytest
import torch
from kernels.draws import G, assignments
from support import close, rounding, strided
from torch import Tensor

from mmvq_kernels.gpu import statistics
from mmvq_kernels.statistics import code_statistics_ref, split

# one row, one code, more codes than rows, primes, more than one tile of columns, no row
SIZES = [(1, 1, 1), (63, 1, 8), (5, 30, 4), (97, 101, 13), (401, 11, 131), (0, 5, 3)]
SIZES += [(9, 3, 1024), (3, 130, 4)]  # wide rows, many codes
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


@pytest.fixture(params=["gather", "keys", "sort", "atomics"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(statistics, "_CHUNK", 32)  # a frequent code has several, the last one short
    if request.param == "keys":
        monkeypatch.setattr(statistics, "_MANY", 0)
    if request.param == "sort":
        monkeypatch.setattr(statistics, "_FEW", 0)
    return str(request.param)


def accumulate(
    values: Tensor, indices: Tensor, L: int, groups: Tensor | None, G: int, way: str
) -> tuple[Tensor, Tensor]:
    flat = statistics.accumulate(values, indices, L, groups, G, way != "atomics")
    return split(flat, G, L, values.shape[1])


@pytest.mark.parametrize(("N", "L", "D"), SIZES)
@DTYPES
def test_equals_the_reference(
    N: int, L: int, D: int, dtype: torch.dtype, way: str, device: str
) -> None:
    values, indices, groups = assignments(N, L, D, device, dtype)
    n, s = code_statistics_ref(values, indices, L)
    counts, sums = accumulate(values, indices, L, None, 1, way)
    assert counts.shape == (1, L)
    assert counts.dtype == sums.dtype == torch.float32
    assert torch.equal(counts[0].double(), n)
    close(sums.cpu(), s.cpu(), rounding(torch.float32, N, N))
    by_group, joint = accumulate(values, indices, L, groups, G, way)
    assert by_group.shape == (G, L)
    for g in range(G):
        of_group = torch.where(groups == g, indices, -1)
        assert torch.equal(by_group[g].double(), code_statistics_ref(values, of_group, L)[0])
    close(joint.cpu(), s.cpu(), rounding(torch.float32, N, N))


def test_left_out_rows_are_not_read(way: str, device: str) -> None:
    values, indices, groups = assignments(150, 7, 4, device)
    values[indices < 0] = torch.nan
    counts, sums = accumulate(values, indices, 7, groups, G, way)
    assert sums.isfinite().all()
    assert counts.sum() == (indices >= 0).sum()
    nobody = torch.full_like(indices, -1)
    by_group = accumulate(values, indices.abs(), 7, torch.where(indices < 0, -1, groups), G, way)
    assert torch.equal(by_group[0], counts)
    close(by_group[1], sums, rounding(torch.float32, 150, 150))
    for out in accumulate(values, nobody, 7, groups, G, way):
        assert (out == 0).all()


@pytest.mark.parametrize("way", ["gather", "keys", "sort"], indirect=True)
def test_same_bits_for_repetition_and_strides(way: str, device: str) -> None:
    values, indices, groups = assignments(700, 5, 16, device)
    counts, sums = accumulate(values, indices, 5, groups, G, way)
    for again in (values, strided(values)):
        other_counts, other_sums = accumulate(
            again, torch.stack([indices, indices], 1)[:, 0], 5, groups, G, way
        )
        assert torch.equal(other_counts, counts)
        assert torch.equal(other_sums, sums)


def test_narrow_values_do_not_saturate(way: str, device: str) -> None:
    values = torch.full((5000, 1), 32.0, dtype=torch.bfloat16, device=device)
    indices = torch.zeros(5000, dtype=torch.long, device=device)
    counts, sums = accumulate(values, indices, 2, None, 1, way)
    assert counts.tolist() == [[5000, 0]]
    assert sums.tolist() == [[160_000], [0]]
