"""The two losses as modules over `mmvq.functional`, where their values are tested."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import DTYPES, bools, uniform, wide
from torch import Tensor

from mmvq import CrossModalCodeMatchingLoss, CrossModalCommitmentLoss
from mmvq.functional import code_matching, commitment

B, T, D, L = 4, 5, 3, 7
NAMES = ("video", "audio", "text")
Tensors = dict[str, Tensor]


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensors, Tensors]:
    z = {m: uniform(B, T, D, dtype=dtype, seed=i) for i, m in enumerate(NAMES)}
    return z, {m: uniform(B, T, D, dtype=dtype, seed=9 + i) for i, m in enumerate(NAMES)}


@pytest.mark.parametrize("ratio", [0, {}, {("audio", "video"): 0.0}], ids=str)
def test_without_cross_terms_modalities_may_differ_in_length(ratio: Any) -> None:
    z = {"audio": uniform(B, T, D, seed=0), "video": uniform(B, T + 2, D, seed=1)}
    e = {m: uniform(*x.shape, seed=2) for m, x in z.items()}
    masks = {m: bools(*x.shape[:2], seed=3) for m, x in z.items()}
    loss = CrossModalCommitmentLoss(cross_ratio=ratio)
    own = [loss({m: z[m]}, {m: e[m]}, {m: masks[m]}) for m in z]
    assert torch.equal(loss(z, e, masks), own[0] + own[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 2.0, "cross_ratio": 0.0},
        {"cross_ratio": {("audio", "video"): 3.0}, "reduction": "sum"},
    ],
)
def test_commitment_is_the_function(dtype: torch.dtype, options: dict[str, Any]) -> None:
    z, e = batch(dtype)
    masks = {m: bools(B, T, seed=i) for i, m in enumerate(NAMES)}
    loss = CrossModalCommitmentLoss(**options)
    assert torch.equal(loss(z, e), commitment(z, e, **options))
    # a modality without a mask is valid throughout
    some = {"audio": masks["audio"]}
    whole = some | {m: torch.ones(B, T, dtype=torch.bool) for m in ("video", "text")}
    assert torch.equal(loss(z, e, some), commitment(z, e, whole, **options))
    assert loss(z, e, masks).dtype == wide(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(z, e), commitment(z, e, **options))


def test_commitment_without_time_and_without_cross_terms() -> None:
    z, e = batch()
    loss = CrossModalCommitmentLoss()
    flat = ({m: x[:, 0] for m, x in part.items()} for part in (z, e))
    timed = ({m: x[:, :1] for m, x in part.items()} for part in (z, e))
    assert torch.equal(loss(*flat), loss(*timed))
    short = {m: x[:, : 2 + i] for i, (m, x) in enumerate(z.items())}
    own = CrossModalCommitmentLoss(cross_ratio=0)
    codes = {m: torch.zeros_like(x) for m, x in short.items()}
    expected = sum(0.25 * x.square().mean() for _, x in sorted(short.items()))
    assert torch.equal(own(short, codes), torch.as_tensor(expected))
    alone = {"audio": z["audio"]}
    assert torch.equal(loss(alone, {"audio": e["audio"]}), own(alone, {"audio": e["audio"]}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matching_is_the_function(dtype: torch.dtype) -> None:
    z, _ = batch(dtype)
    codebook = uniform(L, D, dtype=dtype, seed=20)
    masks = {m: bools(B, T, seed=i) for i, m in enumerate(NAMES)}
    loss = CrossModalCodeMatchingLoss()
    assert torch.equal(loss(z, codebook, masks), code_matching(z, codebook, masks))
    assert torch.equal(loss(z, codebook), code_matching(z, codebook))
    tied = {m: uniform(L, D, dtype=dtype, seed=30 + i) for i, m in enumerate(NAMES)}
    assert torch.equal(loss(z, tied), code_matching(z, tied))
    assert loss(z, codebook).dtype == wide(dtype)


def test_matching_without_time_and_of_other_lengths() -> None:
    z, _ = batch()
    codebook = uniform(L, D, seed=20).requires_grad_()
    loss = CrossModalCodeMatchingLoss()
    flat, timed = ({m: x[:, 0] for m, x in z.items()}, {m: x[:, :1] for m, x in z.items()})
    assert torch.equal(loss(flat, codebook), loss(timed, codebook))
    short = {m: x[:, : 2 + i] for i, (m, x) in enumerate(z.items())}
    loss(short, codebook).backward()
    assert codebook.grad is not None
    assert codebook.grad.abs().sum() > 0
    assert loss({"audio": z["audio"]}, codebook) == 0


def test_settings() -> None:
    shown = "CrossModalCommitmentLoss(beta=0.25, cross_ratio=0.5, reduction='mean')"
    assert repr(CrossModalCommitmentLoss()) == shown
    assert list(CrossModalCodeMatchingLoss().parameters()) == []
