"""The mixing kernel against the torch path in float64.

ATOL: values below 1, of which partner and mixture are means: a score of at most sqrt(D) has D
products in it, and its rounding multiplies the weight; three softmax passes, and a dozen roundings.
"""

from __future__ import annotations

import math

import pytest
import torch
from support import bools, close, rounding, uniform
from torch import Tensor

from mmvq.partners import contributions
from mmvq_kernels.gpu.mixing import mix

# clips, segments, width: one of all, primes, more than a block of columns, of segments
SIZES = [(1, 1, 1), (3, 10, 8), (2, 17, 70), (2, 67, 20), (1, 130, 5), (0, 4, 3)]
PARTNERS = pytest.mark.parametrize("partner", ["attention", "aligned", "none"])


def clips(M: int, B: int, T: int, D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Some vectors are zero, not finite or too large to square."""
    rows = uniform(M * B * T, D, dtype=dtype, seed=M)
    for i, value in enumerate((0.0, torch.nan, torch.inf, 3e15 if dtype != torch.float16 else 1.0)):
        rows[5 * i + 3 :: 31, -1] = value
        rows[5 * i + 3 :: 31, :-1] *= bool(value)
    return rows


def check(
    rows: Tensor,
    valid: Tensor | None,
    B: int,
    groups: list[int],
    partner: str,
    weight: float,
    temperature: float | None,
    device: str,
) -> None:
    M, D = len(groups), rows.shape[1]
    shape = torch.Size((B, len(rows) // max(1, M * B), D))
    names = [str(group) for group in groups]
    padded = rows if valid is None else torch.where(valid[:, None], rows, 0)
    settings = partner, weight, temperature
    shapes = dict.fromkeys(names, shape)
    wanted, owners = contributions(padded, shapes, valid, groups, torch.float64, *settings)
    there = None if valid is None else valid.to(device)
    found, mine = mix(rows.to(device), there, B, groups, *settings)
    assert found.dtype == torch.float32
    assert torch.equal(mine.cpu(), owners)
    enters = owners >= 0
    span = math.sqrt(D) if temperature is None else D / temperature
    atol = rounding(torch.float32, 12 + (4 * D + 12) * span, 1)
    close(found.cpu()[enters], wanted[enters], atol)


@pytest.mark.parametrize(("B", "T", "D"), SIZES)
@pytest.mark.parametrize("M", [1, 2, 3])
@PARTNERS
def test_equals_the_torch_path(B: int, T: int, D: int, M: int, partner: str, device: str) -> None:
    rows = clips(M, B, T, D)
    check(rows, None, B, [*range(M)], partner, 0.5, None, device)
    valid = bools(M * B * T, seed=T)
    valid[: B * T] &= torch.arange(B * T) >= T  # a clip without a segment in one modality
    check(rows, valid, B, [*range(M)], partner, 0.25, None, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@PARTNERS
def test_half_precision(dtype: torch.dtype, partner: str, device: str) -> None:
    check(clips(2, 3, 10, 8, dtype), None, 3, [0, 1], partner, 0.5, None, device)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_temperature(temperature: float, device: str) -> None:
    check(clips(2, 3, 10, 8), None, 3, [0, 1], "attention", 1.0, temperature, device)


def test_a_softmax_that_overflows_leaves_the_vector_out(device: str) -> None:
    rows = torch.full((8, 4), 1e14, device=device)
    values, owners = mix(rows, None, 2, [0, 1], "attention", 0.5, 1e-12)
    assert owners.tolist() == [-1] * 8
    values, owners = mix(rows, None, 2, [0, 1], "attention", 0.5, None)
    assert owners.tolist() == [0] * 4 + [1] * 4
    close(values.cpu() / 1e14, torch.ones(8, 4), rounding(torch.float32, 12, 1))


def test_some_of_the_groups_and_no_weight(device: str) -> None:
    rows = uniform(12, 5, dtype=torch.float32).to(device)
    for groups in ([2, 5], [0, 61], [7]):
        values, owners = mix(rows, None, 2, groups, "attention", 0.0, None)
        assert torch.equal(values, rows)
        assert owners.tolist() == [g for g in groups for _ in range(12 // len(groups))]


def test_masked_vectors_are_not_read(device: str) -> None:
    rows = uniform(24, 5, dtype=torch.float32).to(device)
    valid = bools(24).to(device)
    plain = mix(rows, valid, 3, [0, 1], "attention", 0.5, None)
    rows[~valid] = torch.nan
    again = mix(rows, valid, 3, [0, 1], "attention", 0.5, None)
    assert torch.equal(again[0][valid], plain[0][valid])
    assert torch.equal(again[1], plain[1])


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_numbers_may_be_tensors(temperature: float | None, device: str) -> None:
    """As graphs of torch.compile pass them."""
    rows = clips(2, 3, 10, 8).to(device)
    weight, divisor = (
        None if x is None else torch.tensor(x, device=device) for x in (0.25, temperature)
    )
    plain = mix(rows, None, 3, [0, 1], "attention", 0.25, temperature)
    for a, b in zip(mix(rows, None, 3, [0, 1], "attention", weight, divisor), plain, strict=True):
        assert torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num())


def test_scores_that_all_overflow_leave_the_vector_out(device: str) -> None:
    rows = torch.cat([torch.full((1, 512), 1e15), torch.full((1, 512), -1e15)]).to(device)
    _, owners = mix(rows, None, 1, [0, 1], "attention", 0.5, 1e-6)
    assert owners.tolist() == [-1, -1]
