"""Code probabilities and L_cmcm against the obvious form.

ATOL: entries in [-1, 1], D = 4, so |z|^2, |e|^2 and z.e are at most 4 (centred: 16), and d^2 is
off by 3 * (D + 2) * 16 = 300 roundings at most. d is at least 0.2 in these draws, so it is off by
300 / 0.4 = 750 roundings and ln P by twice that. S has two sums of P ln P with sum P = 1 and
|ln P| < 6: 2 * 1500 * (1 + 6) = 21,000 roundings bound S, and two of these the loss.
"""

from __future__ import annotations

import pytest
import torch
from support import DTYPES, bools, close, rounding, strided, uniform, wide
from torch import Tensor

from mmvq.functional import (
    code_log_probabilities,
    code_matching,
    code_matching_ref,
    code_probabilities,
)

B, T, D, L = 4, 5, 4, 7
Tensors = dict[str, Tensor]


def atol(dtype: torch.dtype) -> float:
    return rounding(wide(dtype), 42_000)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensors, Tensor]:
    z = {m: uniform(B, T, D, dtype=dtype, seed=i) for i, m in enumerate(("audio", "video"))}
    codebook = uniform(L, D, dtype=dtype, seed=5)
    nearest = min(torch.cdist(x.double(), codebook.double()).min() for x in z.values())
    assert nearest > 0.2
    return z, codebook


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(dtype: torch.dtype) -> None:
    z, codebook = batch(dtype)
    expected = code_matching_ref({m: x.double() for m, x in z.items()}, codebook.double())
    loss = code_matching(z, codebook)
    assert loss.dtype == wide(dtype)
    close(loss, expected, atol(dtype))
    per_name = code_matching(z, {m: codebook for m in z})
    assert torch.equal(per_name, loss)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities_equal_the_definition(dtype: torch.dtype) -> None:
    z, codebook = batch(dtype)
    mask = bools(B, T, seed=2)
    mask[:, 0] = True
    x = torch.where(mask[..., None], z["audio"], torch.nan)
    p = code_probabilities(x, codebook, mask)
    distance = (z["audio"].double()[:, :, None] - codebook.double()).norm(dim=-1)
    each = torch.softmax(-distance, -1)
    expected = torch.stack([each[b][mask[b]].mean(0) for b in range(B)])
    assert p.dtype == wide(dtype)
    close(p, expected, atol(dtype))
    close(p.sum(-1), [1.0] * B, rounding(wide(dtype), 4 * L))
    close(code_log_probabilities(x, codebook, mask).exp(), p, atol(dtype))


def test_probabilities_are_even_between_equal_codes() -> None:
    codebook = uniform(1, D).expand(L, D)
    p = code_probabilities(uniform(B, T, D, seed=1), codebook)
    close(p, torch.full((B, L), 1 / L, dtype=torch.float64), rounding(torch.float64, 10))


def test_nothing_to_match_is_zero() -> None:
    z, codebook = batch(torch.float16)
    alone = code_matching({"audio": z["audio"]}, codebook)
    assert alone == 0
    assert alone.dtype == torch.float32
    none = {m: torch.zeros(B, T, dtype=torch.bool) for m in z}
    assert code_matching(z, codebook, none) == 0
    assert code_matching({m: x[:0] for m, x in z.items()}, codebook) == 0
    assert code_probabilities(z["audio"][:0], codebook).shape == (0, L)


def test_strides_and_autocast_do_not_matter() -> None:
    z, codebook = ({m: x.float() for m, x in batch()[0].items()}, batch()[1].float())
    expected = code_matching(z, codebook)
    loose = code_matching({m: strided(x) for m, x in z.items()}, strided(codebook))
    close(loose, expected, atol(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(code_matching(z, codebook), expected)


def test_gradient() -> None:
    z, codebook = batch()
    masks = {"audio": bools(B, T), "video": torch.ones(B, T, dtype=torch.bool)}
    masks["audio"][0] = False
    inputs = [x[:, :3].clone().requires_grad_() for x in z.values()]
    masks = {m: mask[:, :3] for m, mask in masks.items()}

    def loss(a: Tensor, v: Tensor, codes: Tensor) -> Tensor:
        # the centre is a constant of the search, so that the gradient of codes is taken around it
        return code_matching({"audio": a, "video": v}, codes, masks)

    assert torch.autograd.gradcheck(loss, (*inputs, codebook.clone().requires_grad_()))


def test_clips_without_a_segment_have_no_loss() -> None:
    z, codebook = batch()
    assert code_matching({name: x[:, :0] for name, x in z.items()}, codebook) == 0


@pytest.mark.parametrize("masked", [False, True])
def test_modalities_alike_in_one_call_or_each_in_its_own(masked: bool) -> None:
    """One of its own for another codebook object, and for another T."""
    z, codebook = batch()
    masks = {m: bools(B, T, seed=i) for i, m in enumerate(z)} if masked else None
    longer = {"audio": torch.cat([z["audio"], z["audio"]], 1), "video": z["video"]}
    every = masks or {m: torch.ones(B, T, dtype=torch.bool) for m in z}
    padding = {"audio": torch.cat([every["audio"], torch.zeros(B, T, dtype=torch.bool)], 1)}
    calls = [
        (z, codebook, masks),
        (z, {"audio": codebook, "video": codebook.clone()}, masks),
        (longer, codebook, every | padding),
    ]
    found = []
    for features, codes, valid in calls:
        x = {m: v.clone().requires_grad_() for m, v in features.items()}
        loss = code_matching(x, codes, valid)
        grads = torch.autograd.grad(loss, list(x.values()))
        found.append([loss, *(g[:, :T] for g in grads)])
    for other in found[1:]:
        for mine, wanted in zip(found[0], other, strict=True):
            close(mine, wanted, atol(torch.float64))
