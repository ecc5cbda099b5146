"""Time every tile of the search on the GPU that is there, beside the time that `plan` predicts.

    make gpu STAGES=tiles

`plan` in `mmvq_kernels/gpu/nearest.py` chooses by predicted clock cycles, which come from compiled
code. What a tile takes here, over what is predicted for it, becomes its line in the table of this
GPU: `FACTORS`, which `plan` multiplies by. The file has the table as it is to be pasted.
"""

from __future__ import annotations

from functools import partial
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor

from mmvq_kernels.gpu import launching, nearest

from .search import DisagreementError

WIDTHS = (8, 32, 64, 128, 256)  # D
SIZES = (1_600, 400), (17_000, 1_024), (65_536, 1_024), (65_536, 8_192)  # N, L
MEGAHERTZ = 1755  # of an H100 under load; a factor of all tiles alike changes no choice


def figure_tiles(file: Any, device: str, quick: bool) -> None:
    """Each tile at each size, with the codes of a program as `plan` would choose them for it."""
    from .gpu import times

    if not quick and device != "cuda":
        file.content["left out"].append("all: a sweep needs a GPU")
        return
    widths, sizes = ((8, 40), [(96, 40)]) if quick else (WIDTHS, SIZES)
    name = launching.name(torch.empty(0, device=device))
    for D in widths:
        P = nearest.padded(D)
        for N, L in sizes:
            x, codebook = (torch.randn(n, D, device=device) for n in (N, L))
            wanted = nearest.search(x, codebook)
            for tile in nearest.tiles(P):
                share, cycles = nearest.shared(N, L, P, launching.processors(x), tile)
                what = {"N": N, "L": L, "D": D, "tile": "x".join(map(str, tile)), "share": share}
                if file.late(str(what)):
                    continue
                call = partial(nearest.search_with_ticket, x, codebook, force=(tile, share))
                file.row(partial(_measure, call, wanted, cycles, times), **what)
    table = factors([row for row in file.content["rows"] if "over predicted" in row])
    file.content["table"] = {name: table}
    print(f"FACTORS[{name!r}] = {table}")


def _measure(call: Any, wanted: Tensor, cycles: float, times: Any) -> dict[str, Any]:
    """Times of a search.

    Raises:
        DisagreementError: it chose other codes than the tile of `plan`.
    """
    wrong = int((call()[0] != wanted).sum())
    if wrong:
        raise DisagreementError(f"{wrong} of {len(wanted)} vectors got another code")
    found: dict[str, Any] = times(call)
    return {**found, "over predicted": found["us"] * MEGAHERTZ / cycles}


def factors(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Columns and tile -> measured over predicted time, the geometric mean over the sizes.

    Of sizes that take at most twice the least, as launches are no part of the prediction.
    """
    found: dict[str, list[float]] = {}
    for row in rows:
        key = nearest.key(nearest.padded(row["D"]), row["tile"])
        found.setdefault(key, []).append(row["over predicted"])
    return {key: round(geometric_mean(values), 3) for key, values in found.items()}
