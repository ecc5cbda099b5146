"""`functional.nearest_code`: any leading shape over the kernel."""

from __future__ import annotations

import pytest
import torch
from support import DTYPES, strided, uniform

from mmvq.functional import nearest_code, nearest_code_ref


def test_the_reference_is_the_definition() -> None:
    x, codebook = uniform(7, 3), uniform(5, 3, seed=1)
    expected = [min(range(5), key=lambda i: ((row - codebook[i]) ** 2).sum().item()) for row in x]
    assert nearest_code_ref(x, codebook).tolist() == expected


@pytest.mark.parametrize(
    "shape", [(4,), (1, 4), (7, 4), (2, 3, 4), (2, 3, 5, 4), (0, 4), (3, 0, 4)]
)
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    x, codebook = uniform(*shape), uniform(6, 4, seed=1)
    indices = nearest_code(x, codebook)
    assert indices.shape == shape[:-1]
    assert indices.dtype == torch.long
    assert torch.equal(indices.flatten(), nearest_code_ref(x.reshape(-1, 4), codebook))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code_dtype", [torch.float32, torch.float64], ids=str)
def test_a_code_finds_itself_in_any_dtype(dtype: torch.dtype, code_dtype: torch.dtype) -> None:
    codebook = uniform(6, 4, seed=1, dtype=dtype)  # what `dtype` can hold is exact in the others
    assert torch.equal(nearest_code(codebook, codebook.to(code_dtype)), torch.arange(6))


def test_strides_and_no_gradient() -> None:
    x, codebook = uniform(2, 3, 4).requires_grad_(), uniform(6, 4, seed=1).requires_grad_()
    expected = nearest_code(x, codebook)
    assert not expected.requires_grad
    assert torch.equal(nearest_code(strided(x.detach()), strided(codebook.detach())), expected)
