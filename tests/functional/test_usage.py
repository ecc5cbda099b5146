"""Perplexity, shared, single and dead codes; agreement of modalities."""

from __future__ import annotations

import math

import pytest
import torch
from support import bools, close, rounding
from torch import Tensor

from mmvq.functional import code_agreement, code_usage

EPS = 20 * torch.finfo(torch.float32).eps  # a sum of 8 terms and an exponential


def test_perplexity_of_known_distributions() -> None:
    counts = {
        "even": torch.full((8,), 3),
        "one": torch.tensor([0, 0, 9, 0, 0, 0, 0, 0]),
        "none": torch.zeros(8, dtype=torch.long),
        "two to one": torch.tensor([2, 1, 0, 0, 0, 0, 0, 0]),
    }
    usage = code_usage(counts)
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    expected = {"even": 8.0, "one": 1.0, "none": 0.0, "two to one": math.exp(entropy)}
    for name, value in expected.items():
        close(usage.perplexity[name], value, value * EPS)
    assert usage.counts == counts


@pytest.mark.parametrize("dtype", [torch.long, torch.float32, torch.float64], ids=str)
def test_shared_and_dead(dtype: torch.dtype) -> None:
    counts = {
        "audio": torch.tensor([50, 100, 95, 94, 0, 40], dtype=dtype),
        "video": torch.tensor([50, 0, 5, 6, 0, 30], dtype=dtype),
        "text": torch.tensor([0, 0, 0, 0, 0, 30], dtype=dtype),
    }
    usage = code_usage(counts)
    # held: more than 5% of the code's vectors; 5 of 100 is not, 6 of 100 is
    assert usage.shared.tolist() == [True, False, False, True, False, True]
    assert usage.single.tolist() == [False, True, True, False, False, False]
    assert usage.dead.tolist() == [False, False, False, False, True, False]
    assert code_usage(counts, min_share=0.3).shared.tolist() == [True] + [False] * 5
    assert code_usage(counts, min_share=0.0).shared.tolist()[2] is True


def test_one_modality_shares_nothing() -> None:
    usage = code_usage({"audio": torch.tensor([1, 2, 3])})
    assert not usage.shared.any()
    close(
        usage.perplexity["audio"].double(),
        6 / (2 ** (1 / 3) * 3 ** (1 / 2)),
        rounding(torch.float32, 20, 3),
    )


def draw(*shape: int, seed: int, codes: int = 3) -> Tensor:
    return torch.randint(codes, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(7, 5), (7,), (7, 5, 2), (0, 5)], ids=str)
def test_agreement_counts_positions_one_by_one(shape: tuple[int, ...]) -> None:
    indices = {
        name: torch.where(bools(*shape, seed=10 + i), draw(*shape, seed=i), -1)
        for i, name in enumerate(("video", "audio", "text"))
    }
    agreement = code_agreement(indices)
    pairs = [("video", "audio"), ("video", "text"), ("audio", "text")]
    assert list(agreement.equal) == list(agreement.positions) == pairs
    for a, b in pairs:
        both = list(zip(indices[a].flatten().tolist(), indices[b].flatten().tolist(), strict=True))
        valid = [(i, j) for i, j in both if i != -1 and j != -1]
        equal = sum(i == j for i, j in valid)
        assert agreement.equal[a, b] == equal
        assert agreement.positions[a, b] == len(valid)
        if valid:
            close(agreement.share[a, b], equal / len(valid), rounding(torch.float32, 1))
        else:
            assert agreement.share[a, b].isnan()


def test_two_masks_do_not_agree() -> None:
    nowhere = torch.full((2, 3), -1)
    agreement = code_agreement({"audio": nowhere, "video": nowhere})
    assert agreement.equal["audio", "video"] == agreement.positions["audio", "video"] == 0


def test_one_modality_has_no_pair() -> None:
    assert code_agreement({"audio": draw(2, 3, seed=0)}).equal == {}
