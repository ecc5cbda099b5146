"""Retrieval by tokens, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cmg.retrieval import find, ranks, recall, similarity

BOOK = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-3.0, 0.0], [1.0, 1.0]])


def test_similarity_is_the_mean_cosine_over_time() -> None:
    query, gallery = torch.tensor([[0, 1], [3, 3]]), torch.tensor([[0, 1], [2, 1], [1, 0]])
    half = 0.5**0.5
    expected = torch.tensor([[1.0, 0.0, 0.0], [half, 0.0, half]])
    torch.testing.assert_close(similarity(query, gallery, BOOK), expected)


def test_segments_count_that_are_valid_in_both() -> None:
    query, gallery = torch.tensor([[0, -1, 1]]), torch.tensor([[2, 0, 1], [0, 3, -1], [-1, 1, -1]])
    assert similarity(query, gallery, BOOK).tolist() == [[0.0, 1.0, -torch.inf]]


@pytest.mark.parametrize("times", [1, 2, 3])
def test_clips_of_other_lengths_are_compared_at_the_same_share(times: int) -> None:
    query = torch.tensor([[0, 1, 3]])
    long = query.repeat_interleave(times, 1)
    for one, two in ((query, long), (long, query)):
        assert similarity(one, two, BOOK).item() == pytest.approx(1)


def test_the_first_are_the_most_similar() -> None:
    generator = torch.Generator().manual_seed(0)
    model: Any = SimpleNamespace(codebook=torch.randn(16, 8, generator=generator))
    gallery = torch.randint(16, (50, 6), generator=generator)
    found = find(model, gallery[[7, 3]], gallery, k=4)
    assert found.shape == (2, 4)
    assert found[:, 0].tolist() == [7, 3]
    assert find(model, gallery[:1], gallery[:3]).shape == (1, 3)
    assert find(model, gallery[:1], torch.tensor([[-1] * 6, [2] * 6])).tolist() == [[1, -1]]
    own = ranks(similarity(gallery, gallery, model.codebook))
    assert recall(own, 1) == 1.0


def test_ties_rank_the_own_item_last() -> None:
    found = ranks(torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]))
    assert found.tolist() == [2, 1, 3]
    assert [recall(found, k) for k in (1, 2, 3)] == [1 / 3, 2 / 3, 1.0]
