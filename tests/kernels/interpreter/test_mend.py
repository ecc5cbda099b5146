"""Canaries: each fails once the stock interpreter is right, or `mend` is wrong."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from support import uniform
from torch import Tensor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about the interpreter")
N = 16


@triton.jit
def dot_kernel(a, b, out, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    cells = i[:, None] * N + i[None, :]
    tl.store(out + cells, tl.dot(tl.load(a + cells), tl.load(b + cells), input_precision=PRECISION))


@triton.jit
def round_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(tl.bfloat16))


def dot(dtype: torch.dtype, precision: str) -> tuple[Tensor, Tensor]:
    a, b = uniform(N, N, dtype=dtype), uniform(N, N, dtype=dtype, seed=1)
    out = torch.full((N, N), torch.nan)
    dot_kernel[(1,)](a, b, out, N=N, PRECISION=precision)
    return out.double(), a.double() @ b.double()


def rounded() -> tuple[Tensor, Tensor]:
    x = uniform(N, dtype=torch.float32)
    out = torch.empty(N, dtype=torch.bfloat16)
    round_kernel[(1,)](x, out, N=N)
    return out, x.bfloat16()


@pytest.mark.usefixtures("stock")
def test_the_stock_interpreter_is_wrong_about_bfloat16_and_precision() -> None:
    out, expected = dot(torch.bfloat16, "ieee")
    assert not torch.allclose(out, expected, atol=1.0)
    assert not torch.equal(*rounded())
    out, expected = dot(torch.float32, "tf32")
    assert (out - expected).abs().max() < 1e-5  # float32 in all its digits


def test_the_mended_one_is_right() -> None:
    out, expected = dot(torch.bfloat16, "ieee")
    assert (out - expected).abs().max() < N * 2**-23 * N
    assert torch.equal(*rounded())
    out, expected = dot(torch.float32, "tf32x3")
    assert (out - expected).abs().max() < (3 * N + 9) * 2**-23 * N
    out, expected = dot(torch.float32, "tf32")
    assert 2**-14 < (out - expected).abs().max() < 2 * 2**-10 * N
