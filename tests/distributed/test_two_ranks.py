"""Two real processes share a codebook over gloo.

After every step both hold the same bits, and what one process holds that saw the whole batch.

ATOL: float64 states. A code is o / N with o a sum of at most 60 vectors of entries below 5, added
in another order on two ranks: 60 * 2^-53 * 5 * 60 = 2e-12 at most for a step; the average forgets,
so six steps stay below 1e-10. A wrong wiring shows at 1e-3 or more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from mmvq import MultiModalEMAQuantizer, update_codebooks

ATOL = 1e-10
RANKS, STEPS, B, T, D, L = 2, 6, 6, 5, 4, 12
NAMES = ("video", "audio")
State = dict[str, Tensor]

CASES: dict[str, dict[str, Any]] = {
    "kmeans": {"init": "kmeans"},
    "samples": {"init": "samples"},
    "samples, fewer rows than codes": {"init": "samples", "codebook_size": 80},
    "uniform": {"init": "uniform"},
    "reset": {"init": "uniform", "reset_after": 2},
    "reset, any": {"init": "kmeans", "reset_after": 2, "reset_rule": "any"},
    "aligned, one updates": {"partner": "aligned", "update_from": ["audio"]},
    "manual": {"update": "manual"},
    "rank 1 masked": {"init": "kmeans", "reset_after": 2},
    "all masked at first": {"init": "samples", "reset_after": 2},
    "rank 1 without video": {"init": "kmeans", "reset_after": 2},
}


def quantizer(case: str) -> MultiModalEMAQuantizer:
    torch.manual_seed(0)
    settings = {"codebook_size": L, **CASES[case]}
    return MultiModalEMAQuantizer(D, modalities=NAMES, **settings).double()


def batch(case: str, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The whole batch of a step; the first half of the clips is rank 0's."""
    generator = torch.Generator().manual_seed(step)
    z = {m: torch.randn(B, T, D, generator=generator, dtype=torch.float64) for m in NAMES}
    masks = {m: torch.rand(B, T, generator=generator) < 0.8 for m in NAMES}
    if case == "rank 1 masked":
        masks = {m: mask & (torch.arange(B) < B // RANKS)[:, None] for m, mask in masks.items()}
    if case == "all masked at first" and step < 2:
        masks = {m: torch.zeros_like(mask) for m, mask in masks.items()}
    if case == "rank 1 without video":
        masks["video"][B // RANKS :] = False
    return z, masks


def train(case: str, rank: int, ranks: int) -> list[State]:
    """The state after each step on this rank's share of the batches."""
    module, states = quantizer(case), []
    for step in range(STEPS):
        share = slice(rank * B // ranks, (rank + 1) * B // ranks)
        z, masks = ({m: x[share] for m, x in part.items()} for part in batch(case, step))
        if case == "rank 1 without video" and rank == 1:
            z, masks = {"audio": z["audio"]}, {"audio": masks["audio"]}
        module(z, masks)
        if module.update == "manual":
            update_codebooks([module])
        states.append({name: x.clone() for name, x in module.state_dict().items()})
    return states


def work(rank: int, folder: str) -> None:
    """One rank: every case, its states saved for the test to compare."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    torch.save({case: train(case, rank, RANKS) for case in CASES}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[State]]]:
    """What each rank held: case -> a state for each step."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_are_bit_equal(case: str, ranks: list[dict[str, list[State]]]) -> None:
    for mine, other in zip(ranks[0][case], ranks[1][case], strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process_on_the_whole_batch(
    case: str, ranks: list[dict[str, list[State]]]
) -> None:
    alone = train(case, 0, 1)
    assert len(alone) == STEPS
    for mine, expected in zip(ranks[0][case], alone, strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(mine[name], value, atol=ATOL, rtol=0)


def test_the_cases_are_not_empty(ranks: list[dict[str, list[State]]]) -> None:
    """Codes move, resets happen, and what starts masked is not initialised before it may."""
    for case in CASES:
        states = ranks[0][case]
        assert not torch.equal(states[-2]["ema_codebook.codes"], states[-1]["ema_codebook.codes"])
    last = {case: ranks[0][case][-1]["ema_codebook.codes"] for case in CASES}
    assert not torch.equal(last["reset"], last["uniform"])
    masked = [state["ema_codebook.initialized"] for state in ranks[0]["all masked at first"]]
    assert [bool(flag) for flag in masked] == [False, False, True, True, True, True]
