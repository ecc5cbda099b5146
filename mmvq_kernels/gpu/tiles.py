"""The tiles of the search, what they cost, and which one it takes."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from mmvq_kernels.gpu.launching import cdiv


class Tile(NamedTuple):
    """What a program of `search_kernel` works on at a time."""

    rows: int  # vectors
    codes: int
    warps: int
    stages: int


class Cost(NamedTuple):
    """Clock cycles of a tile, at so many columns, on one processor.

    A program takes `steps * step + end`, for steps of 64 columns. Several share what is busiest:
    matrix instructions or loads, `steps * step_together`, or all others, `end_together`.
    """

    resident: int  # programs that a processor holds
    step: int
    end: int
    step_together: int
    end_together: int


# By the most columns that tiles are for. Estimates for an H100: 2,048 products of float16 and 24
# bytes from L2 a cycle, 128 bytes from shared memory, the instructions of the compiled code, of
# which 4 warps issue one each a cycle, 200 cycles of waiting.
TILES: dict[float, dict[Tile, Cost]] = {
    16: {Tile(64, 64, 4, 3): Cost(6, 700, 300, 683, 240)},
    64: {
        Tile(64, 64, 4, 3): Cost(3, 700, 300, 683, 240),
        Tile(128, 128, 8, 2): Cost(2, 1750, 900, 1540, 860),
    },
    128: {
        Tile(64, 64, 4, 2): Cost(2, 700, 300, 683, 240),
        Tile(128, 64, 8, 3): Cost(1, 970, 450, 970, 430),
    },
    math.inf: {
        Tile(64, 64, 4, 3): Cost(2, 1365, 350, 1365, 240),
        Tile(128, 64, 8, 3): Cost(1, 2048, 450, 2048, 430),
        Tile(128, 128, 8, 3): Cost(1, 2730, 900, 2730, 860),
    },
}
# By name of the device and `key` of a tile: its time over the estimate, as `make gpu STAGES=tiles`
# measures it. What is not here counts as it is estimated.
FACTORS: dict[str, dict[str, float]] = {}
_ENDS = 3000  # cycles to begin and end a program


def tiles(P: int) -> dict[Tile, Cost]:
    """The tiles for P columns."""
    return TILES[min(most for most in TILES if most >= P)]


def key(P: int, tile: Tile) -> str:
    """The name of a tile for P columns in `FACTORS`."""
    most = min(most for most in TILES if most >= P)
    return f"{'x'.join(map(str, tile))}, D to {most}"


def predicted(
    N: int, L: int, P: int, processors: int, device: str = ""
) -> dict[tuple[Tile, int], float]:
    """Tile and codes of a program -> estimated cycles of the processor with the most programs."""
    steps, factors = P / 64, FACTORS.get(device, {})

    def cycles(tile: Tile, cost: Cost, share: int) -> float:
        number = share // tile.codes
        programs = cdiv(cdiv(N, tile.rows) * cdiv(L, share), processors)
        alone = _ENDS + number * (steps * cost.step + cost.end)
        together = programs * number * max(steps * cost.step_together, cost.end_together)
        most = max(cdiv(programs, cost.resident) * alone, _ENDS + together)
        return most * factors.get(key(P, tile), 1.0)

    found = {}
    for tile, cost in tiles(P).items():
        most = min(cdiv(L, tile.codes), 8 * processors // max(cdiv(N, tile.rows), 1) + 1)
        for splits in range(1, most + 1):
            share = tile.codes * cdiv(cdiv(L, tile.codes), splits)
            found[tile, share] = cycles(tile, cost, share)
    return found


@functools.lru_cache(1 << 10)
def plan(N: int, L: int, P: int, processors: int, device: str = "") -> tuple[Tile, int]:
    """The tile and the codes of a program, with the least predicted time."""
    found = predicted(N, L, P, processors, device)
    return min(found, key=found.__getitem__)
