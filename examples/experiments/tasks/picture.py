"""Fig. 5: frames, and the masks that heads predict for queries of audio or text."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cmg.digits.style import SCENES
from cmg.figures import require_matplotlib, write_figure
from cmg.run import TrainedRun

from .segmentation import fit_mask_head, masks, scenes


def draw_segmentation(run: TrainedRun, path: Path, columns: int = 10) -> None:
    """Draw test frames with their true masks and those of every pair of query modalities.

    Args:
        run: A run of audio and text.
        path: The png file to write.
        columns: Number of frames, evenly spaced in the test set.
    """
    train, test = scenes(run)
    shown = torch.linspace(0, len(test.cells) - 1, columns).long()
    rows: dict[str, Tensor] = {"frame": test.pictures[shown], "truth": test.masks[shown]}
    for a, learned in train.queries.items():
        head = fit_mask_head(train, learned, run.seed)
        for b, query in test.queries.items():
            rows[f"{a}->{b}"] = masks(head, test.cells[shown], query[shown])
    plot_rows(path, rows, [f"{SCENES.things.names[n]}?" for n in test.classes[shown].tolist()])


def plot_rows(path: Path, rows: dict[str, Tensor], titles: list[str]) -> None:
    """Draw a grid of pictures.

    Args:
        path: The png file to write.
        rows: Label of a row -> [n, H, W]; 0 is black, the maximum of a picture is white.
        titles: Titles of the n columns.
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
    write_figure(figure, path, dpi=64)
