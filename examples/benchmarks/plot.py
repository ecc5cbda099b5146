"""Draw the search benchmark: the time of each alternative relative to mmvq."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "benchmarks" / "1-thread.json"
IMAGE = ROOT / "docs" / "images" / "benchmarks.png"


def draw(results: dict[str, Any], image: Path) -> None:
    """Draw a panel for each N and D of the float32 search: relative times by L.

    Args:
        results: JSON results of the benchmarks; the first search is drawn.
        image: file to write; its extension is the format.
    """
    from matplotlib.figure import Figure

    clock = results["clock of the tables"]
    rows = next(run["rows"] for run in results["runs"] if run["part"] == "search")
    rows = [row for row in rows if row["dtype"] == "float32"]
    peers = sorted({name for row in rows for name in row["ms"]} - {"mmvq"})
    sizes, widths = (sorted({row[key] for row in rows}) for key in ("N", "D"))
    figure = Figure(figsize=(10, 1 + 2 * len(sizes)), layout="constrained")
    grid = figure.subplots(len(sizes), len(widths), sharex=True, sharey=True, squeeze=False)
    for N, line in zip(sizes, grid, strict=True):
        for D, panel in zip(widths, line, strict=True):
            panel.axhline(1, color="black", linewidth=2, label="mmvq")
            here = [row for row in rows if (row["N"], row["D"]) == (N, D)]
            for name in peers:
                points = [
                    (row["L"], row["ms"][name][clock] / row["ms"]["mmvq"][clock])
                    for row in here
                    if name in row["ms"]
                ]
                style = "o--" if name == "product" else "o-"
                panel.plot(*zip(*points, strict=True), style, label=name, markersize=4)
            panel.set(xscale="log", yscale="log", title=f"N = {N:,}, D = {D}")
            panel.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    for panel in grid[-1]:
        codes = sorted({row["L"] for row in rows})
        panel.set_xticks(codes, [f"{L:,}" for L in codes])
        panel.set_xlabel("codes, L")
    figure.supylabel("time relative to mmvq (above 1: mmvq is faster)")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    figure.savefig(image, dpi=120)
