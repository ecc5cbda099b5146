"""The pictures of the report, each drawn from results alone."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import torch

from cmg.figures import plot_codes, require_matplotlib
from cmg.files import write_atomic

from .results import Estimate, Result, code_counts

_COLOURS = ("#d1495b", "#2e6fbb", "#e8a33d", "#7d5ba6")


def plot_code_map(path: Path, result: Result) -> None:
    """Whose codes the codes of one run are, in the paper's colours (Fig. 4)."""
    plane = torch.tensor([[float(x) for x in axis.split()] for axis in result["codes"]["plane"]])
    counts = {name: torch.tensor(n) for name, n in code_counts(result).items()}
    plot_codes(path, plane.T, counts)


def plot_sizes(path: Path, label: str, lines: Mapping[str, Mapping[int, Estimate]]) -> None:
    """Scores over sizes that double, with intervals (Fig. 3).

    Args:
        path: The png file.
        label: Of the axis of sizes.
        lines: Name of a line -> size -> score.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, line), colour in zip(lines.items(), _COLOURS, strict=False):
        sizes, scores = list(line), list(line.values())
        means, halves = [s.mean for s in scores], [s.half for s in scores]
        axes.errorbar(sizes, means, halves, color=colour, marker="o", capsize=3, label=name)
    axes.set_xscale("log", base=2)
    ticks = sorted({size for line in lines.values() for size in line})
    axes.set_xticks(ticks, [str(size) for size in ticks])
    axes.set(xlabel=label, ylim=(0, 1))
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.legend(frameon=False, fontsize=8.5)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150, facecolor="white")
    write_atomic(path, image.getvalue())
