"""Where codes are centred, and which distances are lost to rounding."""

from __future__ import annotations

import pytest
import torch
from support import uniform

from mmvq_kernels.distribution import _distances
from mmvq_kernels.rounding import cancellation_threshold, rounded_mean

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@FLOATS
def test_the_mean_is_rounded_to_a_power_of_two_within_a_sixteenth_of_the_spread(
    dtype: torch.dtype,
) -> None:
    codebook = 100 + uniform(50, 7, dtype=dtype)
    mean, exact = rounded_mean(codebook), codebook.mean(0)
    spread = (codebook - exact).abs().amax()
    assert ((mean - exact).abs() <= spread / 16).all()
    grid = mean * 32  # a spread in [1/2, 2) has a step of 1/16 or 1/8
    assert torch.equal(grid, grid.round())
    assert torch.equal(rounded_mean(codebook[:1]), codebook[0])


@FLOATS
@pytest.mark.parametrize("D", [1, 2, 8, 64, 256, 1024])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_a_vector_on_a_code_is_at_distance_0_and_one_beside_it_is_not(
    dtype: torch.dtype, D: int, scale: float
) -> None:
    codes = (scale * uniform(128, D)).to(dtype)
    norms = codes.square().sum(-1)
    on, lost = _distances(codes[None], codes, norms)
    assert (on[0].diagonal() == 0).all()
    assert lost is not None
    assert torch.equal(lost, on == 0)
    beside = codes * (1 + 2 * cancellation_threshold(dtype, D) ** 0.5)  # four times the share
    off, _ = _distances(beside[None], codes, norms)
    assert (off[0].diagonal() > 0).all()
