"""The sweep over tiles: all choose the same codes, and the factors of a GPU change its plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import tiles as sweep
from benchmarks.search import DisagreementError
from mmvq_kernels.gpu import tiles
from mmvq_kernels.gpu.nearest import padded


def times(call: Callable[[], object]) -> dict[str, Any]:
    call()
    return {"us": 10.0}


def test_each_tile_has_a_factor_and_each_filter_a_time(device: str) -> None:
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    sweep.measure(lambda one, what: rows.append({**what, **one()}), times, device, quick=True)
    keys = {tiles.key(padded(D), t) for D in (8, 40) for t in tiles.tiles(D)}
    found = sweep.factors(rows)
    assert set(found) == keys
    assert all(factor > 0 for factor in found.values())
    filtered = [(row["data"], row["filter"]) for row in rows if "data" in row]
    assert filtered == [(d, f) for d in ("gaussian", "clusters") for f in (False, True)]


def test_no_time_where_codes_disagree() -> None:
    call, wanted = lambda: (torch.tensor([1, 2, 3]), torch.empty(0)), torch.tensor([1, 2, 4])
    with pytest.raises(DisagreementError, match="1 of 3 vectors"):
        sweep._one(call, wanted, times)


def test_a_factor_is_the_mean_over_the_sizes() -> None:
    rows = [{"tile": "a", "factor": x} for x in (1.0, 4.0)] + [{"tile": "b", "factor": 3.0}]
    assert sweep.factors([*rows, {"tile": "c", "error": "none"}]) == {"a": 2.0, "b": 3.0}


def test_factors_change_the_plan_of_their_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 65_536, 8_192, 256, 132
    tile, _ = tiles.plan(*size)
    monkeypatch.setattr(tiles, "FACTORS", {"a GPU": {tiles.key(256, tile): 9.0}})
    tiles.plan.cache_clear()
    assert tiles.plan(*size, "a GPU")[0] != tile
    assert tiles.plan(*size, "another")[0] == tile
    tiles.plan.cache_clear()
