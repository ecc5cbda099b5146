"""The pictures: written whole, for every kind of run, and honest about a missing matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from cmg.errors import DataError
from cmg.figures import plot_codes, plot_training


def test_the_map_of_codes_is_written_whole(tmp_path: Path) -> None:
    counts = {"audio": torch.tensor([3, 0, 1]), "video": torch.tensor([1, 0, 1])}
    plot_codes(tmp_path / "codes.png", torch.eye(3), counts)
    assert imread(tmp_path / "codes.png").shape[:2] == (4.8 * 150, 11 * 150)
    assert [path.name for path in tmp_path.iterdir()] == ["codes.png"]


@pytest.mark.parametrize("terms", [0, 1, 7])
def test_training_has_a_panel_per_quantity(tmp_path: Path, terms: int) -> None:
    history = {f"term {i}": [1.0, float("nan"), 0.5 * i] for i in range(terms)}
    plot_training(tmp_path / "training.png", history)
    rows = max(1, -(-terms // 4))
    assert imread(tmp_path / "training.png").shape[0] == pytest.approx(rows * 2.1 * 150, abs=1)


@pytest.mark.parametrize("terms", [1, 4, 7])
def test_the_lowest_panel_of_every_column_has_its_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terms: int
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("cmg.figures.write_figure", lambda figure, path: drawn.append(figure))
    plot_training(tmp_path / "training.png", {f"term {i}": [1.0, 2.0] for i in range(terms)})
    numbered = [
        panel.get_title() for panel in drawn[0].axes if panel.xaxis.get_tick_params()["labelbottom"]
    ]
    assert numbered == [f"term {i}" for i in range(terms)][-4:]


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DataError, match="figures: matplotlib is not installed"):
        plot_training(tmp_path / "training.png", {"loss": [1.0]})
    assert not list(tmp_path.iterdir())
