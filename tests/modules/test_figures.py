"""The pictures of a codebook: right colours, and any number of modalities and codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from mmvq.figures import plot_codes, plot_usage

AUDIO, VIDEO, SHARED, UNUSED = "#d1495b", "#2e6fbb", "#3f9b52", "#b8b8b8"


def pixels(figure: Figure) -> Tensor:
    """[H, W, 3] in [0, 1]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.tensor(np.asarray(canvas.buffer_rgba()))[..., :3] / 255


def shows(figure: Figure, colour: str) -> bool:
    """Whether the left half, the map of codes, has pixels of a colour (drawn at alpha 0.8)."""
    image = pixels(figure)
    rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    blended = rgb if colour == UNUSED else 0.8 * rgb + 0.2
    near = (image[:400, : image.shape[1] // 2] - blended).abs().amax(-1) < 2 / 255
    return bool(near.sum() > 10)


def test_a_code_has_the_colour_of_its_majority() -> None:
    codebook = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 1.0], [4.0, 1.0]])
    cases = {
        AUDIO: ([81, 50, 50, 0], [19, 50, 50, 0]),
        VIDEO: ([50, 1, 50, 0], [50, 99, 50, 0]),
    }
    for colour, (audio, video) in cases.items():
        counts = {"audio": torch.tensor(audio), "video": torch.tensor(video)}
        figure = plot_codes(codebook, counts)
        other = ({AUDIO, VIDEO} - {colour}).pop()
        assert shows(figure, colour)
        assert shows(figure, SHARED)
        assert shows(figure, UNUSED)
        assert not shows(figure, other)


def test_exactly_80_percent_is_shared() -> None:
    counts = {"audio": torch.tensor([80, 20]), "video": torch.tensor([20, 80])}
    figure = plot_codes(torch.eye(2), counts)
    assert shows(figure, SHARED)
    assert not shows(figure, AUDIO)
    assert not shows(figure, VIDEO)


@pytest.mark.parametrize(
    ("modalities", "L", "D", "highest"),
    [
        (("sound",), 1, 1, 5),
        (("sound",), 37, 8, 5),
        (("audio", "video", "text"), 37, 1, 5),
        (("audio", "video", "text"), 7, 3, 0),
        (tuple("abcdefgh"), 37, 8, 5),
    ],
    ids=str,
)
def test_any_number_of_modalities_and_codes(
    modalities: tuple[str, ...], L: int, D: int, highest: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = {m: torch.randint(highest + 1, (L,), generator=generator) for m in modalities}
    figure = plot_codes(torch.randn(L, D, generator=generator), counts)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    used = int((sum(counts.values()) > 0).sum())
    assert labels[-1] == f"unused: {L - used}" if used < L else labels[-1].startswith("shared")
    assert sum(int(label.split(": ")[1]) for label in labels) == L
    pixels(figure)


def test_usage_over_time_draws_every_figure_of_the_history() -> None:
    nan = float("nan")
    history: dict[str, Any] = {
        "step": [100, 200, 300],
        "perplexity/audio": [3.0, 4.0, 5.0],
        "perplexity/video": [nan, 4.5, 6.0],
        "codes/shared": [0.2, 0.4, 0.6],
        "codes/single": [0.3, 0.3, 0.3],
        "codes/dead": [0.5, 0.3, 0.1],
        "agreement/audio-video": [nan, 0.1, 0.2],
        "club/saturated": [0.0, 0.0, 0.0],
    }
    figure = plot_usage(history)
    codes, perplexity, agreement = figure.axes
    shared, single, dead = (layer.get_paths()[0].vertices for layer in codes.collections)
    for layer, floor, top in ((shared, 0.0, 0.6), (single, 0.6, 0.9), (dead, 0.9, 1.0)):
        last = layer[layer[:, 0] == 300][:, 1]  # the layer's lower and upper edge at the last step
        assert (last.min(), last.max()) == pytest.approx((floor, top))
    for axes, kind in ((perplexity, "perplexity/"), (agreement, "agreement/")):
        lines = {kind + str(line.get_label()): line for line in axes.get_lines()}
        assert set(lines) == {name for name in history if name.startswith(kind)}
        for name, line in lines.items():
            assert list(line.get_xdata()) == history["step"]
            assert list(map(float, line.get_ydata())) == pytest.approx(history[name], nan_ok=True)
    pixels(figure)


def test_usage_of_no_reading_and_of_one_modality() -> None:
    one = {"step": [1], "codes/shared": [0.0], "codes/single": [1.0], "codes/dead": [0.0]}
    for history in ({}, one):
        assert len(plot_usage(history).axes) == 3
