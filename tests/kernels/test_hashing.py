"""The hash is splitmix64, one to one and balanced; repeated rows are found, others are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmvq_kernels.hashing import first_equal_row, mix

MASK = (1 << 64) - 1


def splitmix(key: int) -> int:
    """The published finaliser on unsigned 64-bit integers, as a signed number."""
    z = key * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z


def rows(kind: str) -> Tensor:
    """Rows of the kinds that a weak hash confuses."""
    generator = torch.Generator().manual_seed(0)
    few = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0])
    if kind == "normal":
        return torch.randn(500, 3, generator=generator)
    if kind == "bfloat16":
        return torch.randn(500, 2, generator=generator).bfloat16().float()
    if kind == "grid":
        return torch.cartesian_prod(few, few, few)
    if kind == "signs":
        return torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 10)
    if kind == "complements":  # each with all bits turned, from [1, 2) to (-4, -2]
        words = (1 + torch.rand(50, 1, generator=generator)).view(torch.int32)
        return torch.cat([words, ~words]).view(torch.float32)
    if kind == "one hot":
        return torch.cat([torch.eye(40), -torch.eye(40)])
    return torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 3.0], [3.0, 0.0]])  # permutations


def test_mix_is_splitmix64() -> None:
    keys = [0, 1, -1, 2, 12345, -(1 << 63), (1 << 63) - 1, 1 << 40]
    given = torch.tensor(keys)
    assert mix(given).tolist() == [splitmix(key) for key in keys]
    assert given.tolist() == keys
    assert mix(torch.tensor(7)).item() == splitmix(7)
    assert mix(torch.empty(0, 3, dtype=torch.long)).shape == (0, 3)


def test_mix_is_one_to_one_and_every_bit_is_even() -> None:
    n = 20_000
    mixed = mix(torch.arange(-n // 2, n // 2))
    assert mixed.unique().numel() == n
    ones = torch.stack([(mixed >> bit) & 1 for bit in range(64)]).double().mean(1)
    assert ((ones - 0.5).abs() < 5 * 0.5 / n**0.5).all()  # five deviations of a fair coin


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "kind", ["normal", "bfloat16", "grid", "signs", "complements", "one hot", "permutations"]
)
def test_equal_rows_are_those_seen_before(dtype: torch.dtype, kind: str) -> None:
    distinct = rows(kind).to(dtype)
    distinct = distinct.unique(dim=0)
    assert torch.equal(first_equal_row(distinct), torch.arange(len(distinct)))
    generator = torch.Generator().manual_seed(1)
    codes = distinct[torch.randint(len(distinct), (2 * len(distinct),), generator=generator)]
    seen: dict[tuple[float, ...], int] = {}
    expected = []
    for i, row in enumerate(map(tuple, codes.tolist())):
        expected.append(seen.setdefault(row, i))  # 0.0 == -0.0 for a dictionary, too
    assert first_equal_row(codes).tolist() == expected
    assert first_equal_row(codes.T.contiguous().T).tolist() == expected


def test_signed_zeros_and_a_single_row() -> None:
    zeros = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [1.0, 0.0]])
    assert first_equal_row(zeros).tolist() == [0, 0, 2]
    assert first_equal_row(zeros[:1]).tolist() == [0]
