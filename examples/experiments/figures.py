"""The figures of the report, drawn from the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from einops import rearrange

from cmg import digits
from cmg.digits import speech
from cmg.digits.style import NUMBERS
from cmg.figures import plot_codes, require_matplotlib, write_figure
from mmvq import figures

from .claims import Claim
from .results import Estimate

COLOURS = {"yes": figures.SHARED, "no": figures.OWN[0], "equal": figures.OWN[1], "open": "#999999"}


def plot_claims(path: Path, found: Mapping[str, Mapping[Claim, Sequence[Estimate]]]) -> None:
    """Draw every difference with its interval, by group, for clips and segments."""
    require_matplotlib()
    rows = sum(1 + len(claims) for claims in found.values())
    figure = figures.new_figure(10, 0.2 * rows + 0.8)
    panels = figure.subplots(1, 2, sharey=True)
    labels: list[str] = []
    for group, claims in found.items():
        labels.append(group)
        for claim, differences in claims.items():
            for panel, x in zip(panels, differences, strict=True):
                style = {"color": COLOURS[x.verdict], "marker": "o", "markersize": 4}
                panel.errorbar(x.mean, len(labels), xerr=x.half, **style)
            labels.append(claim.text)
    for panel, title in zip(panels, ("clips (accuracy)", "segments (F1)"), strict=True):
        panel.axvline(0, color=figures.INK, linewidth=0.8)
        panel.set(title=title, ylim=(len(labels), -1))
        panel.set_yticks(range(len(labels)), labels, fontsize=7.5)
        panel.grid(axis="x", color="#e6e6e6", linewidth=0.8)
        figures.tidy(panel)
    for tick in panels[0].get_yticklabels():
        tick.set_fontweight("bold" if tick.get_text() in found else "normal")
    handles = [panels[0].plot([], [], "o", color=c, label=name)[0] for name, c in COLOURS.items()]
    panels[0].legend(handles=handles, frameon=False, fontsize=8, loc="lower right")
    write_figure(figure, path)


def plot_clip(path: Path, seed: int = 0) -> None:
    """Draw a clip of the numbers: frames, sound and sentences, from left to right."""
    require_matplotlib()
    clip = digits.render_clip(seed, 0, 0, NUMBERS)
    sound = rearrange(
        speech.hear(clip.sound), "t (steps bands) -> t bands steps", bands=speech.BANDS
    )
    figure = figures.new_figure(11, 3.0)
    grid = figure.subplots(3, len(sound), height_ratios=(1, 0.7, 0.9))
    names = NUMBERS.things.names
    for t, (frame, heard, text) in enumerate(zip(clip.frames, sound, clip.sentences, strict=True)):
        grid[0, t].imshow(frame, cmap="gray", vmin=0, vmax=1)
        grid[1, t].imshow(heard, origin="lower", aspect="auto", cmap="magma")
        grid[2, t].text(0, 1, fill(text, 15), fontsize=7, va="top")
        for panel, modality in zip(grid[:, t], ("video", "audio", "text"), strict=True):
            shown = clip.plot.shown[modality][t]
            panel.set_title(names[shown] if shown >= 0 else "", fontsize=7, color=figures.OWN[1])
            panel.set_axis_off()
    write_figure(figure, path)


def plot_code_map(path: Path, codes: Mapping[str, Any]) -> None:
    """Draw the codes of one run by modality (Fig. 4), see `train.measure`."""
    plane = torch.tensor([[float(x) for x in axis.split()] for axis in codes["plane"]])
    counts = {name: torch.tensor([*map(int, n.split())]) for name, n in codes["counts"].items()}
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
