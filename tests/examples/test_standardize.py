"""The map that makes features small: what it is fitted on and what it gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from cmg import standardize
from cmg.clips import Clips
from cmg.data import load_clips
from cmg.standardize import Standardizer


def test_components_have_the_shrunk_variance_of_their_axes(clips: Clips) -> None:
    shrink = 5.0
    y = Standardizer.fit(clips, shrink=shrink).transform(clips)["audio"]
    rows = clips.rows(0, 1)
    x = clips.features["audio"][rows].flatten(0, 1).double()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    eigenvalues = torch.linalg.eigvalsh(x.T @ x / len(x)).flip(0)
    covariance = y[rows].flatten(0, 1).double().T.cov(correction=0)
    expected = torch.diag(eigenvalues / (eigenvalues + shrink))
    torch.testing.assert_close(covariance, expected, atol=1e-5, rtol=0)


def test_many_channels_give_the_components_of_a_few(
    clips_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signs aside, which inner products do not show; 300 channels over 30 directions and noise."""
    clips = load_clips(clips_path, ["audio"])
    torch.manual_seed(0)
    directions = torch.randn(30, 300) * torch.logspace(0, -1, 30)[:, None]
    x = torch.randn(*clips.split.shape, 4, 30) @ directions
    clips.features["audio"] = x + 0.01 * torch.randn_like(x)
    exact = Standardizer.fit(clips, width=20).transform(clips)["audio"].flatten(0, 1)
    monkeypatch.setattr(standardize, "_WIDE", 299)
    before = torch.get_rng_state()
    fast = Standardizer.fit(clips, width=20).transform(clips)["audio"].flatten(0, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(fast.abs(), exact.abs())
    torch.testing.assert_close(fast @ fast.T, exact @ exact.T, atol=1e-3, rtol=0)


def test_split_2_has_no_say(clips: Clips) -> None:
    spoilt = {name: x.clone() for name, x in clips.features.items()}
    for x in spoilt.values():
        x[clips.rows(2)] += 100
    there = Standardizer.fit(dataclasses.replace(clips, features=spoilt)).tensors()
    for name, x in Standardizer.fit(clips).tensors().items():
        assert torch.equal(x, there[name])


def test_every_cell_of_a_grid_goes_through_one_map(clips: Clips) -> None:
    standardizer = Standardizer.fit(clips, width=4)
    y = standardizer.transform(clips)["video"]
    N, T = clips.split.shape[0], 4
    assert (y.shape, y.dtype) == ((N, T, 2, 2, 4), torch.float32)
    cell = clips.features["video"][:, :, 1, 0].float()
    expected = (cell - standardizer.mean["video"]) @ standardizer.axes["video"]
    torch.testing.assert_close(y[:, :, 1, 0], expected)


def test_a_sample_of_rows_is_enough_and_always_the_same(clips: Clips) -> None:
    first, again = (Standardizer.fit(clips, samples=50).tensors() for _ in range(2))
    assert all(torch.equal(x, again[name]) for name, x in first.items())
    assert not torch.equal(first["standardizer/mean/audio"], Standardizer.fit(clips).mean["audio"])


def test_a_constant_channel_stays_finite(clips_path: Path) -> None:
    clips = load_clips(clips_path, ["audio"])
    clips.features["audio"][..., 3] = 2.5
    y = Standardizer.fit(clips).transform(clips)["audio"]
    assert y.isfinite().all()


def test_the_unit_of_a_channel_does_not_matter(clips_path: Path) -> None:
    clips = load_clips(clips_path, ["audio"])
    before = Standardizer.fit(clips).transform(clips)["audio"]
    clips.features["audio"][..., 3] *= 2.0**30
    after = Standardizer.fit(clips).transform(clips)["audio"]
    torch.testing.assert_close(after @ after.mT, before @ before.mT, atol=1e-4, rtol=1e-4)


def test_denoise_keeps_everything_at_full_width(clips_path: Path) -> None:
    clips = load_clips(clips_path, ["text"])
    x = clips.features["text"]
    standardizer = Standardizer.fit(clips)
    expected = x - standardizer.mean["text"]
    torch.testing.assert_close(standardizer.denoise("text", x), expected, atol=1e-4, rtol=0)


def test_tensors_and_back(clips: Clips) -> None:
    one = Standardizer.fit(clips)
    two = Standardizer.from_tensors(one.tensors())
    x = one.transform(clips)
    assert all(torch.equal(y, x[name]) for name, y in two.transform(clips).items())
