"""The search's figures as an image: nanoseconds for each pair of vector and code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "benchmarks" / "1-thread.json"
IMAGE = ROOT / "docs" / "images" / "benchmarks.png"


def draw(results: dict[str, Any], image: Path) -> None:
    """One panel for each D of the float32 search: time of a pair over the number of pairs.

    Args:
        results: what the benchmarks wrote as JSON; its first search is drawn.
        image: the file to write; its ending says the format.
    """
    from matplotlib.figure import Figure

    clock = results["clock of the tables"]
    rows = next(run["rows"] for run in results["runs"] if run["part"] == "search")
    rows = [row for row in rows if row["dtype"] == "float32"]
    names = dict.fromkeys(name for row in rows for name in row["ms"])
    widths = sorted({row["D"] for row in rows})
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, len(widths), sharey=True, squeeze=False)[0]
    for panel, D in zip(panels, widths, strict=True):
        for name in names:
            points = sorted(
                (row["N"] * row["L"], 1e6 * row["ms"][name][clock] / (row["N"] * row["L"]))
                for row in rows
                if row["D"] == D and name in row["ms"]
            )
            ours = name == "mmvq"
            width, style = (2.5, "o-") if ours else (1, "--" if name == "product" else ".-")
            panel.loglog(*zip(*points, strict=True), style, label=name, linewidth=width)
        panel.set(title=f"D = {D}", xlabel="pairs, N x L")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ns for a pair")
    panels[-1].legend(fontsize="small")
    figure.savefig(image, dpi=120)
