"""Two real processes watch one codebook over gloo: the same figures as one process, to the bit.

The codebook stands still (decay 1), so that the indices are the same however a batch is split; the
figures are made of whole numbers, and of them in one way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import bools, gloo, run_ranks, uniform

from mmvq import CLUBEstimator, CodebookMonitor, MultiModalEMAQuantizer

RANKS, STEPS, EVERY, B, T, D, L = 2, 4, 2, 5, 3, 4, 12
NAMES = ("video", "audio", "text")
SHARES = (slice(0, 4), slice(4, 5))  # clips of each rank: uneven


def watch(share: slice, second: bool) -> dict[str, Any]:
    """The history on these clips; the second rank holds no text after step 2, and no CLUB."""
    torch.manual_seed(0)
    module = MultiModalEMAQuantizer(D, L, NAMES, decay=1.0, reset_after=None, init="uniform")
    module.set_codes(uniform(L, D, dtype=torch.float32, seed=99))
    club = CLUBEstimator(D, D, 8, logvar_bound=0.1)
    monitor = CodebookMonitor(module, every=EVERY, club=club)
    reduced, calls, all_reduce = [], 0, dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        all_reduce(*args, **kwargs)

    dist.all_reduce = counted
    for step in range(STEPS):
        z = {
            m: uniform(B, T, D, dtype=torch.float32, seed=10 * step + i)
            for i, m in enumerate(NAMES)
        }
        masks = {m: bools(B, T, seed=10 * step + i) for i, m in enumerate(NAMES)}
        masks["text"][SHARES[1]] &= step < 2
        z, masks = ({m: x[share] for m, x in part.items()} for part in (z, masks))
        if not second:
            rows = slice(0, 4)
            club(3 * z["audio"][rows], z["video"][rows])
        elif step >= 2:
            del z["text"], masks["text"]
        module(z, masks)
        calls = 0
        monitor.step()
        reduced.append(calls)
    dist.all_reduce = all_reduce
    return {"history": monitor.history, "reduced": reduced}


def work(rank: int, folder: Path) -> dict[str, Any]:
    with gloo(rank, RANKS, folder):
        return watch(SHARES[rank], rank == 1)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(tmp_path_factory, RANKS, work)


def test_figures_are_those_of_one_process_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    alone = watch(slice(0, B), False)["history"]
    assert alone["step"] == [2, 4]
    assert len(alone) == 1 + 3 + 3 + 3 + 1
    assert all(x == x for values in alone.values() for x in values)  # no NaN
    assert 0 < alone["club/saturated"][0] < 1
    for rank in ranks:
        assert rank["history"] == alone


def test_a_reading_takes_one_reduction_and_a_step_between_none(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["reduced"] == [0, 1, 0, 1]
