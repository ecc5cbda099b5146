"""First codes from data."""

from __future__ import annotations

import pytest
import torch
from support import close, rounding, strided, uniform
from torch import Tensor

from mmvq import functional as F

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def inertia(x: Tensor, centres: Tensor) -> Tensor:
    return torch.cdist(x, centres).min(1).values.square().sum()


@DTYPES
@pytest.mark.parametrize(("rows", "codes"), [(1, 1), (20, 1), (20, 7), (20, 20)])
def test_samples_are_distinct_rows(dtype: torch.dtype, rows: int, codes: int) -> None:
    x = uniform(rows, 3, dtype=dtype)
    drawn = F.sample_rows(x, codes)
    assert drawn.dtype == dtype
    found = [(row == x).all(1).nonzero().item() for row in drawn]  # each is exactly one row
    assert len(set(found)) == codes
    assert torch.equal(F.sample_rows(strided(x), codes), drawn)


def test_a_draw_is_spread_over_the_rows() -> None:
    """Rows are clips in order: a draw must not favour the first of them."""
    picked = F.sample_rows(torch.arange(1000.0)[:, None], 200)
    # the mean of 200 of 1000 has a deviation of 288.7 / sqrt(200) * sqrt(0.8) = 18.3
    assert abs(picked.mean() - 499.5) < 4 * 18.3
    assert picked.unique().numel() == 200


@DTYPES
def test_more_codes_than_rows_repeat_with_a_jitter(dtype: torch.dtype) -> None:
    x = uniform(5, 3, dtype=dtype)
    drawn = F.sample_rows(x, 23)
    order = [(row == x).all(1).nonzero().item() for row in drawn[:5]]
    assert sorted(order) == [0, 1, 2, 3, 4]
    away = drawn - x[torch.tensor(order).repeat(5)[:23]]
    limit = 0.01 * (x.amax(0) - x.amin(0)) + 2 * torch.finfo(dtype).eps
    assert (away[:5] == 0).all()
    assert (away.abs() <= limit).all()
    assert (away[5:] > 0).any()
    assert (away[5:] < 0).any()
    assert drawn.unique(dim=0).shape[0] == 23


@DTYPES
def test_kmeans_is_lloyd(dtype: torch.dtype) -> None:
    x = uniform(60, 2, dtype=dtype)
    centres = F.sample_rows(x, 6)
    for _ in range(4):
        owner = F.nearest_code_ref(x, centres)
        means = [x[owner == i].mean(0) if (owner == i).any() else centres[i] for i in range(6)]
        assert inertia(x, torch.stack(means)) <= inertia(x, centres)
        centres = torch.stack(means)
    # four rounds, each a mean of up to 60 values below 1
    close(F.kmeans(x, 6, iterations=4), centres, rounding(dtype, 4 * 62))
    assert torch.equal(F.kmeans(x, 6, iterations=0), F.sample_rows(x, 6))


def test_kmeans_finds_far_clusters_and_keeps_centres_without_rows() -> None:
    corners = 100 * torch.eye(3, dtype=torch.float64)
    x = corners.repeat_interleave(8, 0) + 0.1 * uniform(24, 3)
    start = F.sample_rows(x, 3)
    assert len({row.argmax().item() for row in start}) > 1
    found = F.kmeans(x, 12)
    assert inertia(x, found) < 24 * 3 * 0.1**2  # every row has a centre in its own corner
    same = torch.ones(4, 3, dtype=torch.float64)  # no spread, no jitter: one code takes all rows
    assert torch.equal(F.kmeans(same, 6), torch.ones(6, 3, dtype=torch.float64))
