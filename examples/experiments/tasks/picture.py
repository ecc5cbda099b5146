"""Fig. 5: frames, and the masks that heads find in them when sound or text asks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cmg.figures import require_matplotlib
from cmg.files import write_atomic

from .segmentation import fit_mask_head, masks, scenes

if TYPE_CHECKING:
    from ..run import TrainedRun


def draw_segmentation(run: TrainedRun, path: Path, columns: int = 10) -> None:
    """Draw frames of the test with their true masks and those of every pair of query modalities.

    Args:
        run: A run of audio and text.
        path: The png file.
        columns: How many frames, evenly spread over the test: none is picked.
    """
    train, test = scenes(run)
    shown = torch.linspace(0, len(test.cells) - 1, columns).long()
    rows: dict[str, Tensor] = {"frame": test.pictures[shown], "truth": test.masks[shown]}
    for a, learned in train.queries.items():
        head = fit_mask_head(train, learned, run.seed)
        for b, query in test.queries.items():
            rows[f"{a}->{b}"] = masks(head, test.cells[shown], query[shown])
    plot_rows(path, rows, [f"{digit}?" for digit in test.classes[shown].tolist()])


def plot_rows(path: Path, rows: dict[str, Tensor], titles: list[str]) -> None:
    """Draw a grid of small pictures.

    Args:
        path: The png file.
        rows: Label of a row -> [n, H, W], from black = 0 to white = the row's highest value.
        titles: Of the n columns.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.1 * len(titles) + 1, 1.1 * len(rows) + 0.3), layout="constrained")
    grid = figure.subplots(len(rows), len(titles), squeeze=False)
    for line, (label, pictures) in zip(grid, rows.items(), strict=True):
        for axes, picture in zip(line, pictures, strict=True):
            axes.imshow(picture.numpy(), cmap="gray", vmin=0)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, fontsize=8.5)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=8.5)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, facecolor="white")
    write_atomic(path, image.getvalue())
