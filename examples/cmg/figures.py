"""Two pictures of a run: whose codes the codes are, and how training went."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import DataError
from .files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHARED = "#3f9b52"
UNUSED = "#b8b8b8"
_INK = "#333333"
_OWN = ("#d1495b", "#2e6fbb", "#e8a33d", "#7d5ba6", "#4aa6a6", "#8c6d46")  # audio, video, text, ...
_MAJORITY = 0.8


def require_matplotlib() -> None:
    """Say what is missing before a run, not after it.

    Raises:
        DataError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DataError(
            "figures need matplotlib, which is not installed. Hint: pip install 'mmvq[examples]'."
        ) from error


def plot_codes(path: str | Path, codebook: Tensor, counts: Mapping[str, Tensor]) -> None:
    """Draw which modalities hold each code, after the paper's Fig. 4.

    Left, the codes on their first two principal axes, a dot's area growing with use: in a
    modality's colour where more than 80 % of the code's segments are that modality's, green where
    no modality has so many, a small cross where the code is unused. Right, the same shares in
    full: a thin column per used code.

    Args:
        path: The png file.
        codebook: [L, D].
        counts: Name -> [L], how often each modality chose each code.
    """
    figure = _figure(11, 4.8)
    atlas, shares = figure.subplots(1, 2, width_ratios=(1, 1.25))
    names = list(counts)
    colours = {name: _OWN[m % len(_OWN)] for m, name in enumerate(names)}
    table = torch.stack([counts[name].cpu().double() for name in names])  # [M, L]
    total = table.sum(0)
    used = total > 0
    share = table / total.clamp(min=1)
    owner = torch.where(share.amax(0) > _MAJORITY, share.argmax(0), len(names))  # M = shared
    owner[~used] = len(names) + 1

    x, y = _principal_plane(codebook.detach().cpu().double(), used).T
    area = 30 + 220 * (total / total.max().clamp(min=1))
    groups = [(name, colours[name]) for name in names] + [("shared", SHARED)]
    atlas.scatter(x[~used], y[~used], s=14, c=UNUSED, marker="x", linewidths=1, label=None)
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
        _plain(axes)
    _write(figure, path)


def plot_training(path: str | Path, history: Mapping[str, Sequence[float]]) -> None:
    """Draw one small panel per quantity, over epochs.

    Args:
        path: The png file.
        history: Name -> a value per epoch: the terms of the loss, perplexity, codes in use, ...
            Values that are not finite leave gaps.
    """
    columns = min(4, max(len(history), 1))
    rows = max(math.ceil(len(history) / columns), 1)
    figure = _figure(2.9 * columns, 2.1 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for panel, (name, values) in zip(panels, history.items(), strict=False):
        panel.plot(range(1, len(values) + 1), values, color=_OWN[1], linewidth=1.8)
        panel.set_title(name)
        panel.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        panel.locator_params(axis="x", integer=True, nbins=5)
        panel.locator_params(axis="y", nbins=4)
        _plain(panel)
    for panel in panels[len(history) :]:
        panel.remove()
    figure.supxlabel("epoch", fontsize=10, color=_INK)
    _write(figure, path)


_LEGEND = {"frameon": False, "handletextpad": 0.4, "columnspacing": 1.2, "labelcolor": _INK}


def _principal_plane(codebook: Tensor, used: Tensor) -> Tensor:
    """All codes on the two axes along which the used ones vary most: [L, 2]."""
    seen = codebook[used] if used.any() else codebook
    centred = codebook - seen.mean(0)
    axes = torch.linalg.svd(seen - seen.mean(0), full_matrices=False).Vh[:2]
    plane = centred @ axes.T
    return torch.nn.functional.pad(plane, (0, 2 - plane.shape[1]))


def _gradual_order(share: Tensor, used: Tensor) -> Tensor:
    """Used codes from those of the first modality to those of the last, evenly mixed in between."""
    centre = torch.arange(len(share), dtype=share.dtype) @ share
    return centre.masked_fill(~used, torch.inf).argsort(stable=True)[: int(used.sum())]


def _figure(width: float, height: float) -> Figure:
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")
    axes.title.set(fontsize=10.5, color=_INK)
    axes.tick_params(labelsize=8.5, colors=_INK, length=3)


def _write(figure: Figure, path: str | Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150, facecolor="white")
    write_atomic(path, image.getvalue())
