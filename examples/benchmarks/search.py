"""Time of the nearest-code search over a grid of sizes."""

from __future__ import annotations

from functools import partial
from itertools import product as grid
from typing import Any

import torch
from torch import Tensor

import mmvq_kernels

from . import peers
from .timing import Call, exponents, geometric_mean, in_turns

SIZES = (1_600, 16_384, 65_536), (400, 1_024, 8_192, 65_536), (8, 64, 256)  # N, L, D
QUICK = (1_600, 4_096), (400, 1_024), (8, 64)
OFFSET = 10.0  # of the vectors and codes whose error is measured: none errs about the origin
MOST_CHECKED = 2_000  # vectors whose error is measured
FLOAT64 = {(1_600, 400, 256), (16_384, 1_024, 64), (16_384, 1_024, 8)}


class DisagreementError(Exception):
    """Two searches chose codes at different distances, so that no times are shown."""


def compare(x: Tensor, codebook: Tensor, chosen: dict[str, Tensor]) -> None:
    """Check that all chose codes at the same distance, up to rounding error of the scores.

    Raises:
        DisagreementError: a search chose a code that is farther.
    """
    distances = {name: _distances(x, codebook, index) for name, index in chosen.items()}
    least = torch.stack(list(distances.values())).amin(0)
    size = x.double().square().sum(1) + codebook.double().square().sum(1).max()
    slack = 4 * x.shape[1] ** 0.5 * torch.finfo(x.dtype).eps * size
    for name, distance in distances.items():
        wrong = int((distance > least + slack).sum())
        if wrong:
            raise DisagreementError(f"{name}: {wrong} of {len(x)} vectors got a farther code")


def _distances(x: Tensor, codebook: Tensor, index: Tensor) -> Tensor:
    parts = zip(x.split(4096), index.to(x.device).split(4096), strict=True)
    return torch.cat([(a.double() - codebook[i].double()).square().sum(1) for a, i in parts])


def least_distance(x: Tensor, codebook: Tensor) -> Tensor:
    """The squared distance to the nearest code, in float64."""
    parts = x.double().split(max(1, (1 << 26) // len(codebook)))
    norms = codebook.double().square().sum(1)
    found = [torch.addmm(norms, p, codebook.double().T, alpha=-2).amin(1) for p in parts]
    return torch.cat(found) + x.double().square().sum(1)


def excess(x: Tensor, codebook: Tensor, index: Tensor, least: Tensor) -> float:
    """By how much a chosen squared distance exceeds the least at most.

    In units in the last place of the least, as a float32: of the code nearest in float64 it is 0.
    """
    single = least.float()
    ulp = torch.nextafter(single, torch.full_like(single, torch.inf)).double() - single
    more = (_distances(x, codebook, index) - least) / ulp
    return round(float(more.max()), 1) if more.max() > 0.1 else 0.0  # float64 rounds too


def run(
    *, quick: bool = False, repeats: int = 5, largest: int = 1 << 35, device: str = "cpu"
) -> list[dict[str, Any]]:
    """One row for each size with at most `largest` multiplications."""
    rows = []
    points = [(*p, torch.float32) for p in grid(*(QUICK if quick else SIZES))]
    points += [(*p, torch.float64) for p in sorted(FLOAT64) if not quick and device == "cpu"]
    for N, L, D, dtype in points:
        if N * L * D > largest:
            continue
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(N, D, generator=generator, dtype=dtype).to(device)
        codebook = torch.randn(L, D, generator=generator, dtype=dtype).to(device)
        searches = {"mmvq": mmvq_kernels.nearest_code, **peers.searches(x, codebook)}
        chosen = {name: torch.as_tensor(f(x, codebook)) for name, f in searches.items()}
        compare(x, codebook, chosen)
        calls: dict[str, Call] = {
            name: partial(f, x, codebook)
            for name, f in {**searches, "product": peers.product}.items()
        }
        few = min(repeats, max(2, (1 << 34) // (N * L * D)))
        times = in_turns(calls, few, device=device)
        name = str(dtype).removeprefix("torch.")
        row = {"N": N, "L": L, "D": D, "dtype": name, "repeats": few, "ms": times}
        if dtype == torch.float32:
            row["ulp"] = _errors(x + OFFSET, codebook + OFFSET, searches)
        if device == "cuda":
            row["MB"] = _gpu_memory(x, codebook)
        rows.append(row)
    return rows


def _errors(x: Tensor, codebook: Tensor, searches: dict[str, peers.Search]) -> dict[str, float]:
    some = torch.arange(0, len(x), max(1, len(x) // MOST_CHECKED), device=x.device)
    least = least_distance(x[some], codebook)
    chosen = {name: torch.as_tensor(f(x, codebook)) for name, f in searches.items()}
    return {
        name: excess(x[some], codebook, index.to(x.device)[some], least)
        for name, index in chosen.items()
    }


def _gpu_memory(x: Tensor, codebook: Tensor) -> int:
    """Peak memory of a search on a GPU in MB, including its result."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mmvq_kernels.nearest_code(x, codebook)
    return (torch.cuda.max_memory_allocated() - before) >> 20


def summary(rows: list[dict[str, Any]], clock: str) -> dict[str, Any]:
    """Geometric means of relative times, and the exponents of N and L in the time of mmvq."""
    ours = [row for row in rows if row["dtype"] == "float32"]
    names = sorted({name for row in ours for name in row["ms"]} - {"mmvq"})
    means = {}
    for name in names:
        both = [row["ms"] for row in ours if clock in row["ms"].get(name, {})]
        means[name] = round(geometric_mean([r["mmvq"][clock] / r[name][clock] for r in both]), 3)
    powers = {}
    for D in sorted({row["D"] for row in ours}):
        points = [
            {"N": row["N"], "L": row["L"], "t": row["ms"]["mmvq"][clock]}
            for row in ours
            if row["D"] == D
        ]
        if len({p["N"] for p in points}) > 1 and len({p["L"] for p in points}) > 1:
            powers[str(D)] = exponents(points, "t", "N", "L")
    return {"mmvq over peer, geometric mean": means, "cost grows as, for each D": powers}
