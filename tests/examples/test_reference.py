"""Linear CCA: the algebra, and that it transfers where the relation is linear."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from cmg.clips import Clips
from cmg.data import load_clips
from cmg.reference import cca_reference, multiset_cca


def test_two_views_give_the_canonical_correlations() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(4000, 2))
    views = {
        "a": np.concatenate([shared, rng.normal(size=(4000, 3))], 1) @ rng.normal(size=(5, 5)),
        "b": (shared + 0.5 * rng.normal(size=(4000, 2))) @ rng.normal(size=(2, 4))
        + 0.01 * rng.normal(size=(4000, 4)),
    }
    views = {name: x - x.mean(0) for name, x in views.items()}
    maps = multiset_cca(views, ridge=0.0)
    qa, qb = (np.linalg.qr(x)[0] for x in views.values())
    expected = np.linalg.svd(qa.T @ qb, compute_uv=False)  # Bjoerck and Golub
    for i in range(2):
        a, b = (views[name] @ maps[name][:, i] for name in views)
        assert np.corrcoef(a, b)[0, 1] == pytest.approx(expected[i], abs=1e-9)


def test_three_views_agree_on_what_they_share() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(2000, 1))
    views = {
        name: np.concatenate([shared, rng.normal(size=(2000, n))], 1)
        @ rng.normal(size=(n + 1, n + 1))
        for name, n in (("a", 2), ("b", 3), ("c", 4))
    }
    maps = multiset_cca({name: x - x.mean(0) for name, x in views.items()}, ridge=1e-6)
    first = np.stack([views[name] @ maps[name][:, 0] for name in views])
    assert np.corrcoef(first).min() > 0.99


def test_a_linear_relation_is_found_in_every_direction(clips: Clips) -> None:
    reference = cca_reference(clips)
    blocks = [reference, reference["logistic_regression"]]
    for scores in (s for block in blocks for s in block["classification"].values()):
        assert scores["accuracy"] >= 0.9
    for scores in (s for block in blocks for s in block["localization"].values()):
        assert scores["segment_f1"] >= 0.9
    assert set(reference["settings"]) == {"classification", "localization"}


def test_unaligned_clips_give_nothing(clips_path: Path) -> None:
    clips = load_clips(clips_path, ["audio", "text"])
    shuffled = clips.features["text"].clone()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled[:60] = shuffled[order].flip(1)  # split 0 only: its pairs no longer show one event
    clips = dataclasses.replace(clips, features=clips.features | {"text": shuffled})
    scores = cca_reference(clips)["classification"]
    assert min(s["accuracy"] for s in scores.values()) < 0.7


def test_a_constant_modality_is_at_chance(clips_path: Path) -> None:
    clips = load_clips(clips_path, ["audio", "text"])
    clips = dataclasses.replace(
        clips, features=clips.features | {"text": torch.ones_like(clips.features["text"])}
    )
    reference = cca_reference(clips)
    for block in (reference, reference["logistic_regression"]):
        for way in block["classification"].values():
            assert way["accuracy"] <= way["chance"]


def test_test_labels_are_not_used_to_choose(clips_path: Path) -> None:
    clips = load_clips(clips_path, ["audio", "video"])
    labels = clips.labels.clone()
    labels[clips.rows(2)] = labels[clips.rows(2)].flip(0)
    other = dataclasses.replace(clips, labels=labels)
    assert cca_reference(clips)["settings"] == cca_reference(other)["settings"]


def test_without_segment_labels_there_is_no_localization(clips: Clips) -> None:
    clips = dataclasses.replace(clips, segment_labels={})
    reference = cca_reference(clips)
    assert reference["localization"] == reference["logistic_regression"]["localization"] == {}
