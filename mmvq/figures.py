"""Figures of a codebook by matplotlib: use by modality, and use over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmvq.checks import message
from mmvq.optional import optional_import

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_codes", "plot_usage"]

OWN = ("#d1495b", "#2e6fbb", "#e8a33d", "#7d5ba6", "#4aa6a6", "#8c6d46")  # audio, video, text, ...
SHARED = "#3f9b52"
UNUSED = "#b8b8b8"
INK = "#333333"
_SINGLE = "#e8d48a"
_MAJORITY = 0.8
_LEGEND: dict[str, Any] = {
    "frameon": False,
    "handletextpad": 0.4,
    "columnspacing": 1.2,
    "labelcolor": INK,
}


def plot_codes(codebook: Tensor, counts: Mapping[str, Tensor]) -> Figure:
    """Plot which modalities use each code, after the paper's Fig. 4.

    Left: the codes on the first two principal axes of the used codes. The area of a dot grows with
    use. A code has a modality's colour if more than 80 % of its vectors are that modality's, and is
    green otherwise; a small cross is an unused code. Right: the share of each modality, one thin
    column for each used code.

    Args:
        codebook: codes `[L, D]`, such as `quantizer.codebook`.
        counts: modality -> choices of each code `[L]`, such as `quantizer.usage().counts`.

    Raises:
        TypeError: `counts` is not a non-empty mapping.
        ImportError: matplotlib is not installed.

    Source: Fig. 4; the paper does not say how it places the codes.
    """
    if not (isinstance(counts, Mapping) and counts):
        rule = "counts must map one or more modalities to tensors [L]"
        hint = "pass quantizer.usage().counts"
        raise TypeError(message("plot_codes", rule, hint=hint, counts=type(counts)))
    figure = new_figure(11, 4.8)
    atlas, shares = figure.subplots(1, 2, width_ratios=(1, 1.25))
    names = list(counts)
    colours = {name: OWN[m % len(OWN)] for m, name in enumerate(names)}
    table = torch.stack([counts[name].cpu().double() for name in names])  # [M, L]
    total = table.sum(0)
    used = total > 0
    share = table / total.clamp(min=1)
    owner = torch.where(share.amax(0) > _MAJORITY, share.argmax(0), len(names))  # M = shared
    owner[~used] = len(names) + 1

    x, y = _principal_plane(codebook.detach().cpu().double(), used).T
    area = 30 + 220 * (total / total.max().clamp(min=1))
    groups = [(name, colours[name]) for name in names] + [("shared", SHARED)]
    atlas.scatter(x[~used], y[~used], s=14, c=UNUSED, marker="x", linewidths=1)
    for group, (label, colour) in enumerate(groups):
        mine = owner == group
        text = f"{label}: {int(mine.sum())}"
        atlas.scatter(
            x[mine], y[mine], s=area[mine], c=colour, alpha=0.8, linewidths=0.6, edgecolors="white"
        )
        atlas.plot([], [], "o", color=colour, markersize=7, label=text)
    if not used.all():
        atlas.plot([], [], "x", color=UNUSED, label=f"unused: {int((~used).sum())}")
    atlas.set(xticks=[], yticks=[], title="Codes by the modality that holds them (> 80 %)")
    atlas.margins(0.08)
    atlas.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, **_LEGEND)

    order = _gradual_order(share, used)
    floor = torch.zeros(len(order), dtype=torch.float64)
    for m, name in enumerate(names):
        height = share[m, order]
        shares.bar(range(len(order)), height, 1.0, floor, color=colours[name], label=name)
        floor = floor + height
    shares.set(xlim=(-0.5, max(len(order), 1) - 0.5), ylim=(0, 1), xticks=[])
    shares.set(title=f"Share of each modality in the {len(order)} codes in use")
    shares.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    shares.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=len(names), **_LEGEND)
    for axes in (atlas, shares):
        tidy(axes)
    return figure


def plot_usage(history: Mapping[str, Sequence[float]]) -> Figure:
    """Plot how the use of a codebook changes over training.

    Left: the shares of codes that several modalities use, that one uses, and that are dead. Middle:
    the perplexity of each modality. Right: the share of positions at which two modalities chose the
    same code. A line has a gap where there are no data.

    Args:
        history: readings of a monitor, `CodebookMonitor.history`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    steps = history.get("step", [])
    lines = {
        title: {name.removeprefix(kind): history[name] for name in history if name.startswith(kind)}
        for kind, title in (
            ("perplexity/", "Perplexity, of each modality"),
            ("agreement/", "Positions with the same code"),
        )
    }
    figure = new_figure(12, 3.2)
    codes, *others = figure.subplots(1, 1 + len(lines))
    parts = {"shared": SHARED, "single": _SINGLE, "dead": UNUSED}
    layers = [history.get(f"codes/{part}", []) for part in parts]
    codes.stackplot(steps, layers, labels=list(parts), colors=list(parts.values()))
    codes.set(ylim=(0, 1), title="Codes, as parts of the codebook")
    for axes, (title, values) in zip(others, lines.items(), strict=True):
        for m, (name, value) in enumerate(values.items()):
            axes.plot(steps, value, color=OWN[m % len(OWN)], linewidth=1.8, label=name)
        axes.set_ylim(bottom=0)
        axes.set_title(title)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    for axes in (codes, *others):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, **_LEGEND)
        tidy(axes)
    figure.supxlabel("step", fontsize=10, color=INK)
    return figure


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure, sizes in inches, without a window or a backend."""
    rule, hint = "pictures need matplotlib, which is not installed", "pip install matplotlib"
    with optional_import("mmvq.figures", rule, hint):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def tidy(axes: Axes) -> None:
    """Style spines, ticks and title."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")
    axes.title.set(fontsize=10.5, color=INK)
    axes.tick_params(labelsize=8.5, colors=INK, length=3)


def _principal_plane(codebook: Tensor, used: Tensor) -> Tensor:
    """Project all codes on the first two principal axes of the used ones: `[L, 2]`."""
    seen = codebook[used] if used.any() else codebook
    centred = codebook - seen.mean(0)
    axes = torch.linalg.svd(seen - seen.mean(0), full_matrices=False).Vh[:2]
    plane = centred @ axes.T
    return torch.nn.functional.pad(plane, (0, 2 - plane.shape[1]))


def _gradual_order(share: Tensor, used: Tensor) -> Tensor:
    """Order the used codes from those of the first modality to those of the last."""
    centre = torch.arange(len(share), dtype=share.dtype) @ share
    return centre.masked_fill(~used, torch.inf).argsort(stable=True)[: int(used.sum())]
