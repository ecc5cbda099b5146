"""Which codes fall idle, and where they restart."""

from __future__ import annotations

from itertools import product
from typing import Literal

import pytest
import torch
from support import uniform

from mmvq.functional import UNSEEN, advance_ages, dead_codes, replacement_codes

L, D = 11, 4


def test_ages_count_the_batches_of_their_own_modality() -> None:
    ages = torch.tensor([[0, 3, UNSEEN], [UNSEEN] * 3, [5, 6, 7]])
    counts = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    # a first sight counts the code not chosen as one batch old; an absent modality does not age
    expected = [[0, 4, 1], [1, 0, 1], [5, 6, 7]]
    assert advance_ages(ages, counts).tolist() == expected
    assert ages.tolist() == [[0, 3, -1], [-1, -1, -1], [5, 6, 7]]


@pytest.mark.parametrize("rule", ["all", "any"])
def test_rules_by_their_words(rule: Literal["all", "any"]) -> None:
    columns = list(product([UNSEEN, 0, 2, 3, 9], repeat=3))
    inactive = dead_codes(torch.tensor(columns).T, 3, rule)
    for column, reset in zip(columns, inactive.tolist(), strict=True):
        chose = [age < 3 for age in column if age != UNSEEN]  # within the last 3 batches
        survives = all(chose) if rule == "all" else any(chose) or not chose
        assert reset is not survives


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_rth_dead_code_goes_to_the_rth_most_chosen(dtype: torch.dtype) -> None:
    codes = uniform(L, D, dtype=dtype)
    counts = torch.tensor([0, 5, 1, 9, 0, 0, 2, 0, 0, 0, 0], dtype=dtype)
    sums = uniform(L, D, dtype=dtype, seed=1) * counts[:, None]
    dead = torch.tensor([i in (0, 4, 5, 7, 8) for i in range(L)])
    new = replacement_codes(codes, dead, sums, counts, torch.tensor(7))
    donors = [3, 1, 6, 2, 3]  # by counts 9, 5, 2, 1, and around again
    # the jitter is at most 1% of the spread; what remains is one rounding of values below 1
    limit = 0.01 * codes.std(0, correction=0) + torch.finfo(dtype).eps
    for i, donor in zip((0, 4, 5, 7, 8), donors, strict=True):
        assert ((new[i] - sums[donor] / counts[donor]).abs() <= limit).all()
    assert not torch.equal(new[0], new[8])  # two codes of one donor part


def test_the_jitter_is_a_symmetric_hash_of_the_step() -> None:
    L, D = 101, 64
    codes = uniform(L, D)
    dead = torch.ones(L, dtype=torch.bool)
    one = replacement_codes(codes, dead, 0 * codes, torch.zeros(L), torch.tensor(1))
    jitter = one / (0.01 * codes.std(0, correction=0))
    # 6,464 uniform numbers: the mean has a deviation of 0.0072, the variance one of 0.0037
    assert jitter.abs().max() <= 1
    assert abs(jitter.mean()) < 5 * 0.0072
    assert abs(jitter.var() - 1 / 3) < 5 * 0.0037
    again = replacement_codes(codes, dead, 0 * codes, torch.zeros(L), torch.tensor(1))
    other = replacement_codes(codes, dead, 0 * codes, torch.zeros(L), torch.tensor(2))
    assert torch.equal(one, again)
    assert (one != other).float().mean() > 0.99
