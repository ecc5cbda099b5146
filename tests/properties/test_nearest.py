"""The search: optimal, deterministic on ties, and the inverse of the look-up."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties.strategies import NAMES, Draw, draws, randn, start

import mmvq_kernels.nearest
from mmvq import MultiModalEMAQuantizer
from mmvq.functional import nearest_code

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e4])
@given(draw=draws(), block_bytes=st.sampled_from((1, 1000, 1 << 22)))
def test_no_code_is_nearer(dtype: torch.dtype, offset: float, draw: Draw, block_bytes: int) -> None:
    """|x - chosen|^2 <= min_l |x - e_l|^2 + bound, the distances in float64.

    With e' = e - mean(e), r = max |e'| and R = |x| + max |e|, a score |e'|^2 / 2 + mean.e' - x.e'
    is a sum of D + 2 products of vectors of at most R and r, and e' itself is off by eps R / 2:
    it is off by at most (D + 4) eps R (r + eps R); the two scores compared by twice that, the
    squared distances by four times. The offset makes R >> r: without centring the bound fails.
    """
    x = (next(iter(draw.features(NAMES[:1]).values())) + offset).to(dtype)
    codes = (draw.codes() + offset).to(dtype)
    with patch.object(mmvq_kernels.nearest, "_BLOCK_BYTES", block_bytes):
        index = nearest_code(x, codes)
    assert index.dtype == torch.long
    assert index.shape == x.shape[:-1]
    x, codes = x.double(), codes.double()
    distances = (x[..., None, :] - codes).square().sum(-1)  # [B, T, L]
    chosen = distances.gather(-1, index[..., None]).squeeze(-1)
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    r = (codes - codes.mean(0)).norm(dim=-1).max()
    R = x.norm(dim=-1) + codes.norm(dim=-1).max()
    bound = 4 * (draw.D + 4) * eps * R * (r + eps * R)
    assert (chosen - distances.amin(-1) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25)
@given(draw=draws(), repeats=st.integers(2, 9))
def test_exact_duplicates_give_the_lowest_index(
    dtype: torch.dtype, draw: Draw, repeats: int
) -> None:
    distinct = draw.codes().round()  # equal rows happen here too
    copies = randn(draw.L * repeats, seed=draw.seed).argsort() % draw.L
    codes = distinct[copies].to(dtype)
    signs = torch.where(randn(*codes.shape, seed=draw.seed + 1) > 0, 1.0, -1.0).to(dtype)
    codes = torch.where(codes == 0, 0 * signs, codes)  # 0 and -0 are one value
    index = nearest_code(randn(50, draw.D, seed=draw.seed + 2).to(dtype), codes)
    first = (codes[index][:, None] == codes).all(-1).long().argmax(1)
    assert torch.equal(index, first)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@given(draw=draws())
def test_encode_inverts_decode(offset: float, draw: Draw) -> None:
    """Codes on distinct points of a lattice lie 1 apart: their scores differ by 1/2 or more.

    Rounding moves two scores by 2 (D + 4) eps R (r + eps R), as above. In float32 at offset 1000
    that is at most 2 * 17 * 1.2e-7 * 7200 * 5.3 = 0.16 (D = 13), or 0.1 (D = 1, r = 31).
    """
    lattice = torch.arange(draw.L)[:, None] // 4 ** torch.arange(draw.D) % 4
    if draw.D < 3:
        lattice = torch.arange(draw.L)[:, None].expand(draw.L, draw.D)
    module = MultiModalEMAQuantizer(draw.D, draw.L, init="uniform")
    start(module.ema_codebook, lattice.float() + offset)
    assert torch.equal(module.encode(module.codebook), torch.arange(draw.L))
    index = torch.arange(2 * draw.L).reshape(1, 2, -1) % draw.L
    codes = module.decode(index)
    assert codes.shape == (1, 2, draw.L, draw.D)
    assert torch.equal(codes, module.codebook[index])
    assert torch.equal(module.encode(codes), index)
    hidden = torch.where(index % 2 == 0, -1, index)
    assert torch.equal(module.decode(hidden), torch.where(hidden[..., None] < 0, 0, codes))


@given(draw=draws(), bad=st.sampled_from((torch.nan, torch.inf, -torch.inf)))
def test_a_row_that_is_not_finite_gets_index_0(draw: Draw, bad: float) -> None:
    """And no other row notices; the codes are far enough from 0 for index 0 to mean something."""
    x = randn(9, draw.D, seed=draw.seed)
    clean = nearest_code(x, draw.codes())
    x[4, draw.D // 2] = bad
    clean[4] = 0
    assert torch.equal(nearest_code(x, draw.codes()), clean)
