"""Eq. 7 against loops in float64.

ATOL: entries up to 10 and a code is sum / count with counts of at least 0.1, so at most 100: a
dozen roundings of 100.
"""

from __future__ import annotations

import pytest
import torch
from support import close, rounding, uniform
from torch import Tensor

from mmvq.functional import ema_update_, ema_update_ref, laplace_smoothing

L, D = 7, 3


def state(dtype: torch.dtype) -> list[Tensor]:
    """Sums, counts, sums of a batch, counts of a batch; code 2 is not chosen."""
    counts, batch_counts = uniform(L, seed=1).abs() * 5 + 0.1, torch.arange(L).double()
    batch_counts[2] = 0
    batch_sums = uniform(L, D, seed=2) * batch_counts[:, None]
    return [x.to(dtype) for x in (uniform(L, D) * 10, counts, batch_sums, batch_counts)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("decay", "eps"), [(0.99, 1e-5), (0.5, 0.1), (1.0, 0.0), (0.0, 1e-5)])
def test_update_and_reference_equal_the_loop(dtype: torch.dtype, decay: float, eps: float) -> None:
    sums, counts, batch_sums, batch_counts = state(dtype)
    o, n, s, b = (x.double().clone() for x in (sums, counts, batch_sums, batch_counts))
    total = sum(decay * n[i] + (1 - decay) * b[i] for i in range(L))
    every = torch.empty(L, D, dtype=torch.float64)
    for i in range(L):
        n[i] = decay * n[i] + (1 - decay) * b[i]
        o[i] = decay * o[i] + (1 - decay) * s[i]
        every[i] = o[i] / ((n[i] + eps) / (total + L * eps) * total)
    codes = uniform(L, D, dtype=dtype, seed=4)
    expected = every.clone()
    for i in range(L):
        if b[i] == 0:  # nothing chose it
            expected[i] = codes[i]
    atol = rounding(dtype, 12, 100)
    kwargs = {"decay": decay, "eps": eps}
    out = ema_update_ref(sums, counts, batch_sums, batch_counts, **kwargs)
    for value, wanted in zip(out, (every, o, n), strict=True):
        close(value, wanted, atol)
    out = ema_update_ref(sums, counts, batch_sums, batch_counts, codes=codes, **kwargs)
    for value, wanted in zip(out, (expected, o, n), strict=True):
        close(value, wanted, atol)
    before = codes.clone()
    ema_update_(codes, sums, counts, batch_sums, batch_counts, decay=decay, eps=eps)
    for value, wanted in zip((codes, sums, counts), (expected, o, n), strict=True):
        close(value, wanted, atol)
    assert torch.equal(codes[b == 0], before[b == 0])


def test_smoothing_keeps_the_total_and_leaves_no_zero() -> None:
    counts = torch.tensor([0.0, 1.0, 7.0], dtype=torch.float64)
    smoothed = laplace_smoothing(counts, 0.5)
    close(smoothed, [8 * (n + 0.5) / 9.5 for n in (0, 1, 7)], rounding(counts.dtype, 8, 8))
    close(smoothed.sum(), 8, rounding(counts.dtype, 8, 8))
    assert torch.equal(laplace_smoothing(counts, 0.0), counts)


def test_a_constant_batch_is_the_fixed_point() -> None:
    """After k equal batches N is n + decay^k (1 - n), and a code tends to the batch mean."""
    _, _, batch_sums, batch_counts = state(torch.float64)
    codes = torch.zeros(L, D, dtype=torch.float64)
    sums, counts = codes.clone(), torch.ones(L, dtype=torch.float64)
    for _ in range(200):
        ema_update_(codes, sums, counts, batch_sums, batch_counts, decay=0.8, eps=0.0)
    close(counts, batch_counts + 0.8**200 * (1 - batch_counts), rounding(counts.dtype, 200 * 3, 6))
    chosen = batch_counts > 0
    means = batch_sums[chosen] / batch_counts[chosen, None]
    close(codes[chosen], means, rounding(counts.dtype, 200 * 3, 6) + 0.8**200 * 6)
