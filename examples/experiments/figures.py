"""The figures of the report, drawn from the results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from cmg.figures import plot_codes, require_matplotlib, write_figure
from mmvq import figures

from .results import Estimate, Result, code_counts


def plot_code_map(path: Path, result: Result) -> None:
    """Draw the codes of one run by modality (Fig. 4)."""
    plane = torch.tensor([[float(x) for x in axis.split()] for axis in result["codes"]["plane"]])
    counts = {name: torch.tensor(n) for name, n in code_counts(result).items()}
    plot_codes(path, plane.T, counts)


def plot_sizes(path: Path, label: str, lines: Mapping[str, Mapping[int, Estimate]]) -> None:
    """Draw scores over sizes on a logarithmic axis, with intervals (Fig. 3).

    Args:
        path: The png file to write.
        label: Label of the axis of sizes.
        lines: Name of a line -> size -> score.
    """
    require_matplotlib()
    figure = figures.new_figure(6.4, 3.6)
    axes = figure.subplots()
    for (name, line), colour in zip(lines.items(), figures.OWN, strict=False):
        means, halves = [x.mean for x in line.values()], [x.half for x in line.values()]
        axes.errorbar(list(line), means, halves, color=colour, marker="o", capsize=3, label=name)
    axes.set_xscale("log", base=2)
    ticks = sorted({size for line in lines.values() for size in line})
    axes.set_xticks(ticks, [str(size) for size in ticks])
    axes.set(xlabel=label, ylim=(0, 1))
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.legend(frameon=False, fontsize=8.5)
    figures.tidy(axes)
    write_figure(figure, path)
