"""Partners: `cross_attend` and `aligned_partner` against loops.

ATOL: entries in [-1, 1] and D = 4, so |logit| <= 4 / 2, off by at most (D + 2) roundings of 2. A
weight is then off by twice that and S roundings more, and so is the output, whose entries are at
most 1: 2 * 2 * (D + 2) + 2 S < 40 roundings; masks and the mean over modalities add less than 10.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import DTYPES, bools, close, rounding, strided, uniform
from torch import Tensor

from mmvq import functional as F

B, T, D = 3, 5, 4
Tensors = dict[str, Tensor]
Partner = Callable[[Tensor, Tensors, Tensors], Tensor]


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensors, Tensors]:
    """Queries, two other modalities of 5 and 7 segments, masks; clip 1 has no text, clip 2 none."""
    others = {"text": uniform(B, 7, D, dtype=dtype, seed=1), "video": uniform(B, T, D, dtype=dtype)}
    masks = {name: bools(B, x.shape[1], seed=3) for name, x in others.items()}
    masks["video"][:2, 0] = True
    masks["text"][0, 0] = True
    masks["text"][1:], masks["video"][2] = False, False
    return uniform(B, T, D, dtype=dtype, seed=2), others, masks


def aligned_loop(z: Tensor, others: Tensors, masks: Tensors) -> Tensor:
    r = z.clone()
    for b in range(len(z)):
        for t in range(z.shape[1]):
            there = [x[b, t] for name, x in others.items() if masks[name][b, t]]
            if there:
                r[b, t] = torch.stack(there).mean(0)
    return r


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_equals_the_loop(dtype: torch.dtype) -> None:
    z, others, masks = batch(dtype)
    expected = F.cross_attend_ref(z.double(), {m: x.double() for m, x in others.items()}, masks)
    r = F.cross_attend(z, others, masks)
    assert r.dtype == dtype
    close(r, expected, rounding(dtype, 50))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_aligned_equals_the_loop(dtype: torch.dtype) -> None:
    z, others, masks = batch(dtype)
    others["text"], masks["text"] = others["text"][:, :T], masks["text"][:, :T]
    expected = aligned_loop(z.double(), {m: x.double() for m, x in others.items()}, masks)
    r = F.aligned_partner(z, others, masks)
    assert r.dtype == dtype
    close(r, expected, rounding(dtype, 2))  # a sum of two and a division


@pytest.mark.parametrize("partner", [F.cross_attend, F.aligned_partner])
def test_padding_is_never_read(partner: Partner) -> None:
    z, others, masks = batch()
    others["text"], masks["text"] = others["text"][:, :T], masks["text"][:, :T]
    spoilt = {m: torch.where(masks[m][..., None], x, torch.nan) for m, x in others.items()}
    assert torch.equal(partner(z, spoilt, masks), partner(z, others, masks))


@pytest.mark.parametrize("partner", [F.cross_attend, F.aligned_partner])
def test_alone_the_partner_is_the_vector_itself(partner: Partner) -> None:
    z, others, masks = batch()
    assert torch.equal(partner(z, {}, {}), z)
    nothing = {m: torch.zeros_like(mask) for m, mask in masks.items()}
    others["text"], nothing["text"] = others["text"][:, :T], nothing["text"][:, :T]
    assert torch.equal(partner(z, others, nothing), z)


@pytest.mark.parametrize("partner", [F.cross_attend, F.aligned_partner])
def test_empty_batch_and_strides(partner: Partner) -> None:
    z, others, masks = batch()
    others["text"], masks["text"] = others["text"][:, :T], masks["text"][:, :T]
    loose = {m: strided(x) for m, x in others.items()}
    close(partner(strided(z), loose, masks), partner(z, others, masks), rounding(z.dtype, 50))
    none = {m: x[:0] for m, x in others.items()}, {m: x[:0] for m, x in masks.items()}
    assert partner(z[:0], *none).shape == (0, T, D)


def test_one_key_is_the_answer_and_equal_keys_average() -> None:
    z = uniform(2, 3, D)
    key = uniform(2, 1, D, seed=1)
    valid = torch.ones(2, 1, dtype=torch.bool)
    assert torch.equal(F.cross_attend(z, {"b": key}, {"b": valid}), key.expand(2, 3, D))
    orthogonal = torch.zeros(2, 1, D, dtype=z.dtype)  # every logit 0: the mean of the values
    keys = uniform(2, 6, D, seed=2)
    r = F.cross_attend(orthogonal, {"b": keys}, {"b": torch.ones(2, 6, dtype=torch.bool)})
    close(r, keys.mean(1, keepdim=True), rounding(z.dtype, 50))


def test_attention_gradient() -> None:
    z, others, masks = batch()
    inputs = [x.requires_grad_() for x in (z, *others.values())]
    assert torch.autograd.gradcheck(
        lambda q, *keys: F.cross_attend(q, dict(zip(others, keys, strict=True)), masks), inputs
    )
