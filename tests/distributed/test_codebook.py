"""Ranks share a codebook: after every step all hold the same bits, and what one process holds.

One process sees the whole batch. Its clips are split unevenly, and of four ranks one gets none.

The tolerance: a code is a mean of vectors with entries below 5, summed in another order on several
ranks; a sum of n terms x has an error of at most n u sum |x|, so that a step moves a code by n u 5
at most, and STEPS steps by STEPS times that, with n the rows of a batch. A wrong wiring shows at
1e-3 or more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from support import same, state
from torch import Tensor

from mmvq import MultiModalEMAQuantizer, update_codebooks

STEPS, B, T, D, L = 6, 11, 5, 4, 12
NAMES = ("video", "audio")
BOUNDS = {1: (0, 11), 2: (0, 7, 11), 4: (0, 5, 5, 9, 11)}  # by the number of ranks
State = dict[str, Tensor]
Steps = list[dict[str, Any]]  # for each step: the state, the loss, the collectives

CASES: dict[str, dict[str, Any]] = {
    "kmeans": {"init": "kmeans"},
    "samples": {"init": "samples"},
    "samples, fewer rows than codes": {"init": "samples", "codebook_size": 140},
    "uniform": {"init": "uniform"},
    "reset, all": {"init": "uniform", "reset_after": 2},
    "reset, any": {"init": "kmeans", "reset_after": 2, "reset_rule": "any"},
    "aligned, one updates": {"partner": "aligned", "update_from": ["audio"]},
    "mixed": {"assignment": "mixed", "reset_after": 2},
    "mixed, one updates": {"assignment": "mixed", "partner": "aligned", "update_from": ["audio"]},
    "no partner": {"partner": "none", "init": "samples"},
    "float32": {"init": "kmeans", "reset_after": 2},
    "manual": {"update": "manual"},
    "two codebooks": {"update": "manual", "reset_after": 2},
    "rank 1 masked": {"init": "kmeans", "reset_after": 2},
    "rank 1 NaN": {"init": "kmeans", "reset_after": 2},
    "all masked at first": {"init": "samples", "reset_after": 2},
    "rank 0 masked at first": {"init": "kmeans"},
    "rank 1 without video": {"init": "kmeans", "reset_after": 2},
    "frozen and eval between": {"init": "samples", "reset_after": 2},
    "ranks without a vector stay away": {"update": "manual", "reset_after": 2},
}
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "barrier")


def dtype(case: str) -> torch.dtype:
    return torch.float32 if case == "float32" else torch.float64


def quantizers(case: str, group: dist.ProcessGroup | None = None) -> list[MultiModalEMAQuantizer]:
    torch.manual_seed(0)
    settings = {"codebook_size": L, "process_group": group, **CASES[case]}
    count = 2 if case == "two codebooks" else 1
    return [
        MultiModalEMAQuantizer(D, modalities=NAMES, **settings).to(dtype(case))
        for _ in range(count)
    ]


def batch(case: str, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The whole batch of a step."""
    generator = torch.Generator().manual_seed(step)
    z = {m: torch.randn(B, T, D, generator=generator, dtype=dtype(case)) for m in NAMES}
    masks = {m: torch.rand(B, T, generator=generator) < 0.8 for m in NAMES}
    first = torch.arange(B) < BOUNDS[2][1]  # the clips of rank 0 of two, of ranks 0 and 1 of four
    second = ~first
    if case == "rank 1 masked" or (case == "ranks without a vector stay away" and step > 1):
        masks = {m: mask & first[:, None] for m, mask in masks.items()}
    if case == "rank 1 NaN":
        z = {m: torch.where(second[:, None, None], torch.nan, x) for m, x in z.items()}
    if case == "all masked at first" and step < 2:
        masks = {m: torch.zeros_like(mask) for m, mask in masks.items()}
    if case == "rank 0 masked at first" and step < 2:
        masks = {m: mask & second[:, None] for m, mask in masks.items()}
    if case == "rank 1 without video":
        masks["video"][second] = False
    return z, masks


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """Every collective that is called, with the dimensions of its buffer."""
    calls: list[tuple[str, int]] = []

    def counting(name: str, collective: Callable[..., object]) -> Callable[..., object]:
        def call(x: Any, *rest: Any, **options: Any) -> object:
            calls.append((name, x.ndim if isinstance(x, Tensor) else -1))
            return collective(x, *rest, **options)

        return call

    with patch.multiple(dist, **{n: counting(n, getattr(dist, n)) for n in COLLECTIVES}):
        yield calls


def train(case: str, modules: list[MultiModalEMAQuantizer], rank: int, ranks: int) -> Steps:
    """What this rank holds after each step on its share of the batches."""
    done: Steps = []
    low, high = BOUNDS[ranks][rank : rank + 2]
    for step in range(STEPS):
        z, masks = ({m: x[low:high] for m, x in p.items()} for p in batch(case, step))
        if case == "rank 1 without video" and ranks > 1 and not masks["video"].any() and high > low:
            z, masks = {"audio": z["audio"]}, {"audio": masks["audio"]}
        with counted() as calls:
            there = [*modules]
            if case == "ranks without a vector stay away" and step > 0:
                there = [] if not any(mask.any() for mask in masks.values()) else there
            loss = torch.zeros(())
            for module in there:
                module.train(case != "frozen and eval between" or step != 3)
                frozen = case == "frozen and eval between" and step == 4
                loss = module(z, masks, freeze=frozen).loss
            if modules[0].update == "manual":
                update_codebooks(modules)
        state = {
            f"{i} {name}": x.clone()
            for i, module in enumerate(modules)
            for name, x in module.state_dict().items()
        }
        done.append({"state": state, "loss": loss.detach(), "calls": calls})
    return done


def before_init() -> dict[str, list[MultiModalEMAQuantizer]]:
    return {case: quantizers(case) for case in CASES}


def run(
    rank: int, pair: dist.ProcessGroup, early: dict[str, list[MultiModalEMAQuantizer]]
) -> dict[str, dict[str, Steps]]:
    """All four ranks with modules built before the group was, then two pairs with later ones."""
    return {
        case: {
            "4": train(case, early[case], rank, 4),
            "2": train(case, quantizers(case, pair), rank % 2, 2),
        }
        for case in CASES
    }


def steps(results: list[dict[str, Any]], case: str, ranks: int) -> list[Steps]:
    """Of each rank; of the two pairs, which did the same, all four."""
    return [result["test_codebook"][case][str(ranks)] for result in results]


@cache
def alone(case: str) -> Steps:
    return train(case, quantizers(case), 0, 1)


each_case = pytest.mark.parametrize("case", CASES)
each_number = pytest.mark.parametrize("ranks", [2, 4])


@each_case
@each_number
def test_ranks_are_bit_equal(case: str, ranks: int, results: list[dict[str, Any]]) -> None:
    first, *others = steps(results, case, ranks)
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            assert mine["state"].keys() == theirs["state"].keys()
            for name, x in mine["state"].items():
                assert torch.equal(x, theirs["state"][name]), name


@each_case
@each_number
def test_equals_one_process_on_the_whole_batch(
    case: str, ranks: int, results: list[dict[str, Any]]
) -> None:
    assert len(alone(case)) == STEPS
    rows = len(NAMES) * B * T
    atol = STEPS * rows * torch.finfo(dtype(case)).eps / 2 * 5
    for mine, expected in zip(steps(results, case, ranks)[0], alone(case), strict=True):
        for name, value in expected["state"].items():
            torch.testing.assert_close(mine["state"][name], value, atol=atol, rtol=0)


@each_case
@each_number
def test_a_step_is_one_all_reduce_of_one_flat_buffer(
    case: str, ranks: int, results: list[dict[str, Any]]
) -> None:
    for rank in range(4):
        done = steps(results, case, ranks)[rank]
        for step, calls in enumerate([made["calls"] for made in done]):
            ready = step > 0 and all(
                flag for name, flag in done[step - 1]["state"].items() if "initialized" in name
            )
            if case == "frozen and eval between" and step in (3, 4):
                assert calls == []
            elif ready or CASES[case].get("init") == "uniform":
                assert calls == [("all_reduce", 1)]
            else:  # the first codes are gathered before
                assert calls.count(("all_reduce", 1)) == 1
                assert {name for name, _ in calls} == {"all_reduce", "all_gather"}


@pytest.mark.parametrize("before", [0, 1], ids=["never used", "used"])
def test_one_process_without_statistics_takes_no_step(before: int) -> None:
    """Of several ranks one may have none and yet step; alone there is nothing to step with."""
    (module,) = quantizers("manual")
    for step in range(before):
        module(batch("manual", step)[0])
        module.update_codebook()
    held = state(module)
    module.update_codebook()
    module.ema_codebook.apply()
    update_codebooks(module)
    assert same(state(module), held)
    assert module.ema_codebook.steps == before


def test_the_cases_are_not_empty(results: list[dict[str, Any]]) -> None:
    """Codes move, resets happen, and what starts masked is not initialised before it may."""
    codes = "0 ema_codebook.codes"
    last = {}
    for case in CASES:
        before, after = (made["state"][codes] for made in steps(results, case, 4)[0][-2:])
        assert not torch.equal(before, after)
        last[case] = after
    assert not torch.equal(last["reset, all"], last["uniform"])
    masked = steps(results, "all masked at first", 4)[0]
    flags = [bool(made["state"]["0 ema_codebook.initialized"]) for made in masked]
    assert flags == [False, False, True, True, True, True]
    frozen = [made["state"][codes] for made in steps(results, "frozen and eval between", 4)[0]]
    same = [torch.equal(a, b) for a, b in pairwise(frozen)]
    assert same == [False, False, True, True, False]
