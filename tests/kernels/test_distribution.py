"""The torch path of the code distribution: blocks of clips, its own gradient, its memory.

ATOL: entries and codes in [-1, 1], so a squared distance sums D products of at most 4, twice: off
by (D + 4) roundings of 8 D. Its root is above 0.1 here, hence off by 5 times that at most, and so
is a logarithm of a softmax; the mean over T adds a few roundings.
"""

from __future__ import annotations

import pytest
import torch
from support import bools, close, peak_growth, rounding, uniform

from mmvq_kernels import code_log_probabilities
from mmvq_kernels.distribution import code_log_probabilities_ref

B, T, D, L = 7, 5, 3, 41


def atol(dtype: torch.dtype) -> float:
    return 5 * rounding(dtype, D + 4 + T, 8 * D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("block_bytes", [1, 3 * T * L * 8, 1 << 22])
def test_blocks_of_any_size(
    dtype: torch.dtype, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmvq_kernels.distribution._BLOCK_BYTES", block_bytes)
    x, codebook = uniform(B, T, D, dtype=dtype), 2 + uniform(L, D, dtype=dtype, seed=1)
    close(code_log_probabilities(x, codebook), code_log_probabilities_ref(x, codebook), atol(dtype))
    assert code_log_probabilities(x[:0], codebook).shape == (0, L)


@pytest.mark.parametrize("clips", [1, 3, 100])
def test_the_gradient_by_recomputation(clips: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmvq_kernels.distribution._BLOCK_BYTES", clips * T * L * 8)
    x = uniform(B, T, D).requires_grad_()
    codebook = uniform(L, D, seed=1).requires_grad_()
    mask = bools(B, T, seed=2)
    mask[3] = False
    assert torch.autograd.gradcheck(code_log_probabilities, (x, codebook, mask))
    (alone,) = torch.autograd.grad(code_log_probabilities(x, codebook.detach(), mask).sum(), x)
    both = torch.autograd.grad(code_log_probabilities(x, codebook, mask).sum(), (x, codebook))
    assert torch.equal(alone, both[0])


def test_a_vector_on_a_code_has_a_finite_gradient() -> None:
    codebook = uniform(L, D, dtype=torch.float32).requires_grad_()
    x = codebook.detach()[: B * T].view(B, T, D).clone().requires_grad_()
    log_p = code_log_probabilities(x, codebook)
    log_p.square().sum().backward()
    for tensor in (log_p, x.grad, codebook.grad):
        assert tensor is not None
        assert tensor.isfinite().all()


def test_memory_holds_a_few_clips() -> None:
    """All distances are 256 MiB in float32, and plain autograd keeps several such tensors."""
    setup = (
        "def step(B, T, L):\n"
        "    x = torch.rand(B, T, 4, requires_grad=True)\n"
        "    log_p = mmvq_kernels.code_log_probabilities(x, torch.rand(L, 4))\n"
        "    log_p.square().sum().backward()\n"
        "step(2, 3, 5)\n"
    )
    assert peak_growth(setup, "step(64, 64, 16384)") < 400  # a block is 32 MiB, the result 4
