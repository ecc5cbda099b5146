"""The pictures: written whole, for every kind of run, and honest about a missing matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from cmg.errors import DataError
from cmg.figures import plot_codes, plot_training

AUDIO, VIDEO, SHARED, UNUSED = "#d1495b", "#2e6fbb", "#3f9b52", "#b8b8b8"


def shows(path: Path, colour: str) -> bool:
    """Whether the left half, the map of codes, has pixels of a colour (drawn at alpha 0.8)."""
    image = torch.tensor(imread(path))[:, :, :3]
    rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    blended = rgb if colour == UNUSED else 0.8 * rgb + 0.2
    near = (image[:600, : image.shape[1] // 2] - blended).abs().amax(-1) < 2 / 255
    return bool(near.sum() > 10)


def test_a_code_has_the_colour_of_its_majority(tmp_path: Path) -> None:
    codebook = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 1.0], [4.0, 1.0]])
    cases = {
        AUDIO: ([81, 50, 50, 0], [19, 50, 50, 0]),
        VIDEO: ([50, 1, 50, 0], [50, 99, 50, 0]),
    }
    for colour, (audio, video) in cases.items():
        counts = {"audio": torch.tensor(audio), "video": torch.tensor(video)}
        plot_codes(tmp_path / "codes.png", codebook, counts)
        other = ({AUDIO, VIDEO} - {colour}).pop()
        assert shows(tmp_path / "codes.png", colour)
        assert shows(tmp_path / "codes.png", SHARED)
        assert shows(tmp_path / "codes.png", UNUSED)
        assert not shows(tmp_path / "codes.png", other)


def test_exactly_80_percent_is_shared(tmp_path: Path) -> None:
    counts = {"audio": torch.tensor([80, 20]), "video": torch.tensor([20, 80])}
    plot_codes(tmp_path / "codes.png", torch.eye(2), counts)
    assert shows(tmp_path / "codes.png", SHARED)
    assert not shows(tmp_path / "codes.png", AUDIO)
    assert not shows(tmp_path / "codes.png", VIDEO)


@pytest.mark.parametrize("modalities", [("sound",), ("audio", "video", "text"), tuple("abcdefgh")])
@pytest.mark.parametrize(("L", "D", "highest"), [(1, 1, 5), (37, 1, 5), (37, 8, 5), (7, 3, 0)])
def test_any_number_of_modalities_and_codes(
    tmp_path: Path, modalities: tuple[str, ...], L: int, D: int, highest: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = {m: torch.randint(highest + 1, (L,), generator=generator) for m in modalities}
    plot_codes(tmp_path / "codes.png", torch.randn(L, D, generator=generator), counts)
    assert imread(tmp_path / "codes.png").std() > 0
    assert [path.name for path in tmp_path.iterdir()] == ["codes.png"]


@pytest.mark.parametrize("terms", [0, 1, 7])
def test_training_has_a_panel_per_quantity(tmp_path: Path, terms: int) -> None:
    history = {f"term {i}": [1.0, float("nan"), 0.5 * i] for i in range(terms)}
    plot_training(tmp_path / "training.png", history)
    rows = max(1, -(-terms // 4))
    assert imread(tmp_path / "training.png").shape[0] == pytest.approx(rows * 2.1 * 150, abs=1)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DataError, match="figures need matplotlib, which is not installed"):
        plot_training(tmp_path / "training.png", {"loss": [1.0]})
    assert not list(tmp_path.iterdir())
