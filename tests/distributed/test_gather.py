"""With gather=True, Cross-CPC, L_cmcm and CLUB are those of one process on the whole batch.

Four ranks hold 5, 0, 4 and 2 of the clips. Each encodes its own, takes the loss and differentiates
it; then gradients are averaged, as DDP does. Values and gradients must be those of one process.

ATOL: float64. Losses are means of at most ROWS = 11 * 5 scores, summed in another order, and the
gradients of weights sums of as many terms, all below 100: 55 * 2^-53 * 100 = 6e-13. A missing
factor or a missing clip shows at 1e-3 or more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import mmvq
from mmvq.distributed import average_, gather_batch_sizes
from mmvq.functional import code_matching

ATOL = 1e-12
B, T, D, S, L = 11, 5, 6, 3, 8
NAMES = ("video", "audio")
BOUNDS = {1: (0, 11), 2: (0, 7, 11), 4: (0, 5, 5, 9, 11)}
Batch = dict[str, Tensor]
Masks = dict[str, Tensor] | None


class Model(nn.Module):
    """A linear encoder for each modality, and one of the losses."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: nn.Linear(D, D) for name in NAMES})
        self.loss = loss

    def encode(self, x: Batch) -> Batch:
        return {name: self.encoders[name](v) for name, v in x.items()}


def cpc(model: Model, x: Batch, masks: Masks) -> list[Tensor]:
    out = model.loss(model.encode(x), masks)
    return [out.loss, *out.accuracy.values()]


def cpc_all(model: Model, x: Batch, masks: Masks) -> list[Tensor]:
    out = model.loss(model.encode(x), masks, start="all")
    return [out.loss, *out.accuracy.values()]


def matching(model: Model, x: Batch, masks: Masks) -> list[Tensor]:
    return [model.loss(model.encode(x), codes(), masks)]


def club(model: Model, x: Batch, masks: Masks) -> list[Tensor]:
    z = model.encode(x)
    return [model.loss(z["video"], z["audio"][..., :S], None if masks is None else masks["video"])]


def club_penalty(model: Model, x: Batch, masks: Masks) -> list[Tensor]:
    z = model.encode(x)
    mask = None if masks is None else masks["video"]
    return [model.loss.penalty(z["video"], z["audio"][..., :S], mask)]


def club_fit(model: Model, x: Batch, masks: Masks) -> list[Tensor]:
    mask = None if masks is None else masks["audio"]
    return [model.loss.learning_loss(x["audio"], x["video"][..., :S], mask)]


Options = dict[str, Any]
CASES: dict[str, tuple[Callable[[Options], nn.Module], Callable[..., list[Tensor]]]] = {
    "cpc": (lambda o: mmvq.CrossCPC(D, NAMES, num_steps=2, **o), cpc),
    "cpc over contexts": (
        lambda o: mmvq.CrossCPC(D, NAMES, normalize_over="contexts", self_weight=0.1, **o),
        cpc_all,
    ),
    "cpc over both": (
        lambda o: mmvq.CrossCPC(
            D, NAMES, first_step=0, normalize_over="both", temperature=0.1, normalize=True, **o
        ),
        cpc_all,
    ),
    "matching": (lambda o: mmvq.CrossModalCodeMatchingLoss(**o), matching),
    "club": (lambda o: mmvq.CLUBEstimator(D, S, 8, **o), club),
    "club's penalty": (lambda o: mmvq.CLUBEstimator(D, S, 8, **o), club_penalty),
    "club's own step": (lambda o: mmvq.CLUBEstimator(D, S, 8, **o), club_fit),
}


def codes() -> Tensor:
    return torch.randn(L, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def batch(masked: bool, low: int, high: int) -> tuple[Batch, Masks]:
    generator = torch.Generator().manual_seed(2)
    x = {m: torch.randn(B, T, D, generator=generator, dtype=torch.float64) for m in NAMES}
    masks = {m: torch.rand(B, T, generator=generator) < 0.7 for m in NAMES}
    masks["audio"][-2:] = False  # all that the last rank has
    mine = {m: mask[low:high] for m, mask in masks.items()}
    return {m: v[low:high] for m, v in x.items()}, mine if masked else None


def measure(
    case: str, masked: bool, rank: int, ranks: int, group: dist.ProcessGroup | None = None
) -> list[Tensor]:
    """Values, then the averaged gradients of all parameters."""
    make, call = CASES[case]
    torch.manual_seed(0)
    model = Model(make({"gather": True, "process_group": group})).double()
    torch.manual_seed(7 + rank)  # what a rank draws is its own; the start must be rank 0's
    values = call(model, *batch(masked, *BOUNDS[ranks][rank : rank + 2]))
    values[0].backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    average_(gradients, group)
    return [x.detach() for x in (*values, *gradients)]


@cache
def whole(case: str, masked: bool) -> list[Tensor]:
    return measure(case, masked, 0, 1)


def refusals() -> dict[str, str]:
    """What each rank is told when rank 2 brings another T, or one modality less."""
    said = {}
    x, _ = batch(False, 0, 3)
    short = {m: v[:, 1:] for m, v in x.items()} if dist.get_rank() == 2 else x
    fewer = {"audio": x["audio"]} if dist.get_rank() == 2 else x
    calls = {
        "cpc, T": lambda: mmvq.CrossCPC(D, NAMES, gather=True).double()(short),
        "cpc, names": lambda: mmvq.CrossCPC(D, NAMES, gather=True).double()(fewer),
        "matching, names": lambda: mmvq.CrossModalCodeMatchingLoss(gather=True)(fewer, codes()),
        "club, T": lambda: mmvq.CLUBEstimator(D, D, gather=True)(short["audio"], short["video"]),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match="must be the same on all ranks") as error:
            call()
        said[name] = str(error.value)
    return said


def in_another_order(rank: int) -> Tensor:
    """L_cmcm where odd ranks name their modalities the other way round."""
    x, _ = batch(False, *BOUNDS[4][rank : rank + 2])
    x = dict(reversed(x.items())) if rank % 2 else x
    clips = gather_batch_sizes("a test", x["audio"], names=tuple(x))
    return code_matching(x, codes(), batch=clips)


def before_init() -> None:
    return None


def run(rank: int, pair: dist.ProcessGroup, early: None) -> dict[str, Any]:
    measured = {
        f"{case} {masked} {ranks}": measure(case, masked, place, ranks, group)
        for case in CASES
        for masked in (False, True)
        for place, ranks, group in ((rank, 4, None), (rank % 2, 2, pair))
    }
    first = dist.new_group([0, 1])
    place, ranks = (rank, 2) if rank < 2 else (0, 1)
    outside = {case: measure(case, True, place, ranks, first) for case in CASES}
    turned = in_another_order(rank)
    return {"measured": measured, "outside": outside, "turned": turned, "refusals": refusals()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_value_and_gradient_are_those_of_one_process(
    case: str, masked: bool, ranks: int, results: list[dict[str, Any]]
) -> None:
    alone = whole(case, masked)
    assert len(alone) > 1
    assert all(x.abs().sum() > 0 for x in (alone[0], alone[-1]))
    for result in results:
        found = result["test_gather"]["measured"][f"{case} {masked} {ranks}"]
        for mine, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(mine, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_a_process_outside_the_group_is_alone(case: str, results: list[dict[str, Any]]) -> None:
    """Ranks 0 and 1 of four share a group; 2 and 3 pass it too, each with the whole batch."""
    alone = whole(case, True)
    for result in results:
        for mine, expected in zip(result["test_gather"]["outside"][case], alone, strict=True):
            torch.testing.assert_close(mine, expected, atol=ATOL, rtol=0)


def test_ranks_may_name_modalities_in_any_order(results: list[dict[str, Any]]) -> None:
    alone = code_matching(batch(False, 0, B)[0], codes())
    for result in results:
        torch.testing.assert_close(result["test_gather"]["turned"], alone, atol=ATOL, rtol=0)


def test_ranks_that_do_not_fit_are_refused_by_all(results: list[dict[str, Any]]) -> None:
    for result in results:
        said = result["test_gather"]["refusals"]
        assert len(said) == 4
        assert all("ranks_unlike_rank_0: [2]" in text for text in said.values())
    said = results[2]["test_gather"]["refusals"]
    assert "T of this rank: 4" in said["cpc, T"]
    assert "modalities of this rank: ('audio',)" in said["matching, names"]
