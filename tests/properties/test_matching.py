"""L_cmcm: symmetric, finite where it used to be NaN, and right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties.strategies import EPS, NAMES, Draw, draws, randn
from support import close
from torch import Tensor

from mmvq import CrossModalCodeMatchingLoss
from mmvq.functional import code_matching, code_probabilities

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
matching = CrossModalCodeMatchingLoss()


def slack(draw: Draw) -> float:
    """Squared distances of about 4 D at most come from cancelling products: D eps each, which the
    root of one near 0.01 multiplies by 10; then sums over L codes of P ln P, and over B clips.
    """
    return 1000 * EPS * (draw.D + draw.L + draw.B) * draw.D


@pytest.mark.parametrize("names", [NAMES[:2], NAMES])
@given(draw=draws())
def test_symmetric_in_the_modalities_and_in_the_clips(names: Sequence[str], draw: Draw) -> None:
    """Whoever holds what; to the bit if only the order of the mapping changes."""
    z, masks, codes = draw.features(names), draw.masks(names), draw.codes()
    expected = matching(z, codes, masks)
    for order in permutations(names):
        reordered = {n: z[n] for n in order}
        assert torch.equal(matching(reordered, codes, masks), expected)
        assert torch.equal(code_matching(reordered, codes, masks), expected)
        swapped = {new: z[old] for new, old in zip(names, order, strict=True)}
        valid = {new: masks[old] for new, old in zip(names, order, strict=True)}
        close(matching(swapped, codes, valid), expected, slack(draw))
    clips = randn(draw.B, seed=draw.seed).argsort()
    permuted = {n: x[clips] for n, x in z.items()}, {n: m[clips] for n, m in masks.items()}
    close(matching(permuted[0], codes, permuted[1]), expected, slack(draw))
    shuffled = codes[randn(draw.L, seed=draw.seed).argsort()]
    close(matching(z, shuffled, masks), expected, slack(draw))


@pytest.mark.parametrize("names", [NAMES[:2], NAMES])
@given(draw=draws())
def test_a_clip_masked_in_one_modality_is_in_no_pair_with_it(
    names: Sequence[str], draw: Draw
) -> None:
    z, masks, codes = draw.features(names), draw.masks(names), draw.codes()
    some = {name: mask.any(1) for name, mask in masks.items()}
    pairs = []
    for a, b in combinations(names, 2):
        both = some[a] & some[b]
        if both.any():
            pair = {n: z[n][both] for n in (a, b)}, {n: masks[n][both] for n in (a, b)}
            pairs.append(matching(pair[0], codes, pair[1]))
    expected = torch.stack(pairs).mean() if pairs else 0.0
    close(matching(z, codes, masks), expected, slack(draw))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", [NAMES[:2], NAMES])
@given(draw=draws(), offset=st.sampled_from((0.0, 100.0)))
def test_finite_where_a_feature_is_a_code(
    names: Sequence[str], dtype: torch.dtype, draw: Draw, offset: float
) -> None:
    """Loss and gradients, for features and codes, when every feature is a code exactly."""
    codes = (draw.codes() + offset).to(dtype).requires_grad_()
    z: dict[str, Tensor] = {}
    for m, name in enumerate(names):
        picks = randn(draw.B, draw.T, draw.L, seed=draw.seed + m).argmax(-1)
        z[name] = codes.detach()[picks].requires_grad_()
    value = matching(z, codes)
    assert value.isfinite()
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    for g in torch.autograd.grad(value, [*z.values(), codes]):
        assert g.isfinite().all()
    p = code_probabilities(z[names[0]], codes)
    # L + T terms of at most 1 are added to sum to 1.
    close(
        p.sum(1).double(), torch.ones(draw.B).double(), (draw.L + draw.T) * torch.finfo(p.dtype).eps
    )


@pytest.mark.parametrize("names", [NAMES[:2], NAMES])
def test_from_chance_to_certainty(names: Sequence[str]) -> None:
    """ln B when all clips use the codes alike; close to 0 when each pair has codes of its own.

    Codes s apart: P is close to 1 at a clip's own code and e^-s at another, so that S_ij is about
    -2s, S_ii about 0, and the loss about (B - 1) e^-2s.
    """
    B, T, s = 7, 3, 12.0
    codes = s / math.sqrt(2) * torch.eye(B, 11, dtype=torch.float64)
    same = dict.fromkeys(names, codes[:1].expand(B, T, 11))
    close(matching(same, codes), math.log(B), 1e4 * EPS)
    apart = dict.fromkeys(names, codes[:, None].expand(B, T, 11))
    assert 0 < matching(apart, codes) < 10 * B * math.exp(-2 * s)
    wrong = {name: x.roll(m, 0) for m, (name, x) in enumerate(apart.items())}
    assert matching(wrong, codes) > s
