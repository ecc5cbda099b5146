"""The figures of a run: codes by modality, and training curves."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from mmvq import figures

from .errors import optional_import
from .files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require_matplotlib() -> None:
    """Check that matplotlib is installed, before a long run.

    Raises:
        DataError: matplotlib is not installed.
    """
    with optional_import("figures", "pip install 'mmvq[examples]'"):
        import matplotlib  # noqa: F401


def plot_codes(path: str | Path, codebook: Tensor, counts: Mapping[str, Tensor]) -> None:
    """Draw which modalities use each code, with `mmvq.figures.plot_codes`.

    Args:
        path: The png file to write.
        codebook: Codes [L, D].
        counts: Name -> [L], number of vectors of the modality with each code.
    """
    require_matplotlib()
    write_figure(figures.plot_codes(codebook, counts), path)


def plot_training(path: str | Path, history: Mapping[str, Sequence[float]]) -> None:
    """Draw each quantity over epochs, in a panel of its own.

    Args:
        path: The png file to write.
        history: Name -> a value for each epoch. Values that are not finite leave gaps.
    """
    require_matplotlib()
    columns = min(4, max(len(history), 1))
    rows = max(math.ceil(len(history) / columns), 1)
    figure = figures.new_figure(2.9 * columns, 2.1 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for panel, (name, values) in zip(panels, history.items(), strict=False):
        panel.plot(range(1, len(values) + 1), values, color=figures.OWN[1], linewidth=1.8)
        panel.set_title(name)
        panel.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        panel.locator_params(axis="x", integer=True, nbins=5)
        panel.locator_params(axis="y", nbins=4)
        figures.tidy(panel)
    for panel in panels[len(history) :]:
        panel.remove()
    for panel in panels[len(history) - columns : len(history)]:  # the lowest of each column
        panel.tick_params(labelbottom=True)
    figure.supxlabel("epoch", fontsize=10, color=figures.INK)
    write_figure(figure, path)


def write_figure(figure: Figure, path: str | Path, *, dpi: int = 150) -> None:
    """Write a figure as a png file, atomically."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=dpi, facecolor="white")
    write_atomic(path, image.getvalue())
