"""Activation checkpointing on several ranks: the codebook of one process without it.

A forward pass that runs again in the backward pass adds no row and takes no step. ATOL: as in
test_codebook, a step moves a code by n u 5 at most, n = B T M the rows of a batch, entries below 5.
Rows that are counted twice make N and o wrong by 1e-2 or more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mmvq

STEPS, B, T, D, L = 5, 8, 5, 4, 6
NAMES = ("audio", "video")
ATOL = STEPS * B * T * len(NAMES) * torch.finfo(torch.float64).eps / 2 * 5
State = dict[str, Tensor]


class Quantizer(nn.Module):
    """Encoders and a quantizer, which moves its codebook by itself or is told to."""

    def __init__(self, update: Any, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: nn.Linear(D, D) for name in NAMES})
        self.quantizer = mmvq.MultiModalEMAQuantizer(
            D, L, NAMES, update=update, reset_after=2, process_group=group
        )
        self.update = update

    def forward(self, audio: Tensor, video: Tensor) -> Tensor:
        z = {"audio": self.encoders["audio"](audio), "video": self.encoders["video"](video)}
        quantized, _, loss = self.quantizer(z)
        return loss + quantized["audio"].square().mean()

    def move(self) -> None:
        if self.update == "manual":
            self.quantizer.update_codebook()


class Residual(nn.Module):
    """Two codebooks of one's own, the second for what the first leaves."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.encoder = nn.Linear(D, D)
        self.books = nn.ModuleList(mmvq.EMACodebook(D, L, process_group=group) for _ in range(2))

    def forward(self, audio: Tensor, video: Tensor) -> Tensor:
        left = self.encoder(torch.cat([audio, video]))
        loss = left.new_zeros(())
        for book in self.books:
            index = book.search(left)
            book.accumulate(left, index)
            loss = loss + (left - book.weight[index]).square().mean()
            left = left - book.weight[index]
        return loss

    def move(self) -> None:
        mmvq.update_codebooks(self.books)


CASES: dict[str, Callable[[dist.ProcessGroup | None], Quantizer | Residual]] = {
    "auto": lambda group: Quantizer("auto", group),
    "manual": lambda group: Quantizer("manual", group),
    "residual": Residual,
}
REENTRANT = {"saved": False, "reentrant": True}
each_case = pytest.mark.parametrize("case", CASES)
each_kind = pytest.mark.parametrize("kind", REENTRANT)


def train(
    case: str,
    reentrant: bool | None,
    rank: int = 0,
    ranks: int = 1,
    group: dist.ProcessGroup | None = None,
) -> State:
    """The codebooks after the steps; `reentrant` None is without checkpointing."""
    torch.manual_seed(0)
    model = CASES[case](group).double()
    generator = torch.Generator().manual_seed(1)
    share = slice(rank * B // ranks, (rank + 1) * B // ranks)
    for _ in range(STEPS):
        audio, video = (
            torch.randn(B, T, D, generator=generator, dtype=torch.float64)[share].requires_grad_()
            for _ in NAMES
        )
        if reentrant is None:
            loss = model(audio, video)
        else:
            loss = checkpoint(model, audio, video, use_reentrant=reentrant)
        loss.backward()
        model.move()
    return {name: x.clone() for name, x in model.state_dict().items() if "encoder" not in name}


def before_init() -> None:
    return None


def run(rank: int, pair: dist.ProcessGroup, early: None) -> dict[str, State]:
    """Four ranks, and two pairs."""
    return {
        f"{case} {kind} {ranks}": train(case, reentrant, rank % ranks, ranks, group)
        for case in CASES
        for kind, reentrant in REENTRANT.items()
        for ranks, group in ((4, None), (2, pair))
    }


@cache
def plain(case: str) -> State:
    return train(case, None)


def check(found: State, case: str) -> None:
    expected = plain(case)
    steps = [int(x) for name, x in expected.items() if name.endswith("steps")]
    assert steps == [STEPS] * (2 if case == "residual" else 1)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, atol=ATOL, rtol=0, msg=name)


@each_case
@each_kind
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_hold_what_one_process_holds(
    case: str, kind: str, ranks: int, results: list[dict[str, Any]]
) -> None:
    for result in results:
        check(result["test_checkpointing"][f"{case} {kind} {ranks}"], case)


@each_case
@each_kind
def test_one_process_too(case: str, kind: str) -> None:
    check(train(case, REENTRANT[kind]), case)
