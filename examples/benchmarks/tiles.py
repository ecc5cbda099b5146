"""Time every tile of the search on a GPU, and make its table: `make gpu STAGES=tiles`.

`plan` in `mmvq_kernels/gpu/tiles.py` chooses a tile by clock cycles estimated from compiled code.
What a tile takes here over its estimate is its factor. The factors of a GPU, as this stage writes
and prints them, are its entry in `FACTORS` there. Large searches are also timed with the filter
first, on data that it suits and on data that it does not: where it pays, the GPU gets an entry in
`FILTERS` (`mmvq_kernels/gpu/filtering.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor

from .search import DisagreementError

WIDTHS = (8, 32, 64, 128, 256)  # D
SIZES = [(1_600, 400), (17_000, 1_024), (65_536, 1_024), (65_536, 8_192)]  # N, L
FILTERED = [(65_536, 8_192, 64), (65_536, 8_192, 256), (65_536, 1_024, 256)]  # N, L, D
CLOCK = 1755  # MHz of an H100 under load; another would change all factors alike

Found = dict[str, Any]


def measure(
    rows: Callable[[Callable[[], Found], Found], None],
    times: Callable[[Callable[[], object]], Found],
    device: str,
    quick: bool,
) -> None:
    """Call `rows` with what measures each tile at each size, and each filter, and what it is."""
    from mmvq_kernels.gpu import launching, nearest, tiles

    for D in (8, 40) if quick else WIDTHS:
        for N, L in [(96, 40)] if quick else SIZES:
            x, codebook = gaussian(N, L, D, device)
            P, name = nearest.padded(D), launching.name(x)
            cycles = tiles.predicted(N, L, P, launching.processors(x), name)
            best = {t: min((c, s) for (of, s), c in cycles.items() if of == t) for t, _ in cycles}
            for tile, (estimate, share) in best.items():
                estimate /= tiles.FACTORS.get(name, {}).get(tiles.key(P, tile), 1.0)
                call = partial(nearest.search_with_ticket, x, codebook, force=(tile, share))
                what = {"N": N, "L": L, "D": D, "tile": tiles.key(P, tile), "share": share}
                rows(partial(_one, call, nearest.search(x, codebook), times, estimate), what)
    sieve = tiles.Tile(128, 128, 8, 2)
    for N, L, D in [(200, 70, 40)] if quick else FILTERED:
        for data in (gaussian, clusters):
            x, codebook = data(N, L, D, device)
            for forced in (None, sieve):
                call = partial(nearest.search_with_ticket, x, codebook, force_filter=forced)
                what = {"N": N, "L": L, "D": D, "data": data.__name__, "filter": bool(forced)}
                rows(partial(_one, call, nearest.search(x, codebook), times), what)


def gaussian(N: int, L: int, D: int, device: str) -> tuple[Tensor, Tensor]:
    """Vectors and codes of which a filter proves most."""
    return torch.randn(N, D, device=device), torch.randn(L, D, device=device)


def clusters(N: int, L: int, D: int, device: str) -> tuple[Tensor, Tensor]:
    """Those of which it proves few: all close to one of a few points."""
    points = torch.randn(8, D, device=device)
    x, codebook = gaussian(N, L, D, device)
    of_x, of_codes = (torch.randint(8, (n,), device=device) for n in (N, L))
    return points[of_x] + 1e-3 * x, points[of_codes] + 1e-3 * codebook


def _one(
    call: Callable[[], tuple[Tensor, Tensor]],
    wanted: Tensor,
    times: Callable[[Callable[[], object]], Found],
    estimate: float | None = None,
) -> Found:
    """The times of a search.

    Raises:
        DisagreementError: its codes are not those of the tile and way of `plan`.
    """
    if wrong := int((call()[0] != wanted).sum()):
        raise DisagreementError(f"{wrong} of {len(wanted)} vectors got another code")
    found = times(call)
    return found if estimate is None else {**found, "factor": found["us"] * CLOCK / estimate}


def factors(rows: list[Found]) -> dict[str, float]:
    """The factor of each tile: the geometric mean over the sizes."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if "factor" in row:
            found.setdefault(row["tile"], []).append(row["factor"])
    return {tile: round(geometric_mean(values), 3) for tile, values in found.items()}
