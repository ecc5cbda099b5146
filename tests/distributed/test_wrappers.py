"""DDP and FSDP2 around a model with all the parts: three steps equal those of one process.

ATOL: float64, weights below 1, and SGD at rate 0.1: a step adds the rounding of gradients, sums of
B * T = 40 terms below 100, 40 * 2^-53 * 100 * 0.1 = 5e-14, and what differs afterwards grows with
the curvature, below 10 for each step: 1e-11 after three. A wrong wiring shows at 1e-3 or more.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import mmvq

ATOL = 1e-11
STEPS, B, T, D, S, L = 3, 8, 5, 6, 3, 8
NAMES = ("video", "audio")
Batch = dict[str, Tensor]
State = dict[str, Tensor]


class Model(nn.Module):
    """Encoders, quantizer and every loss, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: nn.Linear(D, D) for name in NAMES})
        self.quantizer = mmvq.MultiModalEMAQuantizer(D, L, NAMES, reset_after=1)
        self.cpc = mmvq.CrossCPC(D, NAMES, gather=True)
        self.matching = mmvq.CrossModalCodeMatchingLoss(gather=True)
        self.club = mmvq.CLUBEstimator(D, S, 8, gather=True)

    def forward(self, x: Batch) -> Tensor:
        z = {name: self.encoders[name](v) for name, v in x.items()}
        quantized, _, loss = self.quantizer(z)
        loss = loss + self.cpc(z, start="all").loss + self.matching(z, self.quantizer.codebook)
        loss = loss + self.club(z["audio"], z["video"][..., :S])
        return loss + quantized["audio"].square().mean()


def before_init() -> Model:
    torch.manual_seed(0)
    return Model().double()


def train(model: nn.Module, rank: int, ranks: int) -> State:
    """Parameters and buffers after the steps."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(3)
    share = slice(rank * B // ranks, (rank + 1) * B // ranks)
    for _ in range(STEPS):
        x = {m: torch.randn(B, T, D, generator=generator, dtype=torch.float64) for m in NAMES}
        optimizer.zero_grad()
        model({m: v[share] for m, v in x.items()}).backward()
        optimizer.step()
    state = {name.removeprefix("module."): x for name, x in model.state_dict().items()}
    return {
        name: (x.full_tensor() if isinstance(x, DTensor) else x).clone()
        for name, x in state.items()
    }


def run(rank: int, pair: dist.ProcessGroup, early: Model) -> dict[str, State]:
    found = {"ddp": train(DistributedDataParallel(early), rank, 4)}
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    unsynchronised = DistributedDataParallel(before_init(), **{name: False})
    found["ddp, buffers its own"] = train(unsynchronised, rank, 4)
    sharded = before_init()
    fully_shard(sharded)
    found["fsdp"] = train(sharded, rank, 4)
    found["rank 0 has loaded"] = train(DistributedDataParallel(loaded_on_rank_0(rank)), rank, 4)
    return found


def loaded_on_rank_0(rank: int) -> Model:
    """Only rank 0 has read the checkpoint, of a codebook in use; DDP hands its state to the others.

    A rank must not take its first codes from data then: it would wait for the others in vain.
    """
    model = before_init()
    if rank == 0:
        state = before_init().state_dict()
        state["quantizer.ema_codebook.initialized"].fill_(True)
        model.load_state_dict(state)
    return model


def alone(case: str) -> State:
    return train(loaded_on_rank_0(0) if case == "rank 0 has loaded" else before_init(), 0, 1)


@pytest.mark.parametrize("case", ["ddp", "ddp, buffers its own", "fsdp", "rank 0 has loaded"])
def test_equals_one_process(case: str, results: list[dict[str, Any]]) -> None:
    expected = alone(case)
    first = results[0]["test_wrappers"][case]
    assert first.keys() == expected.keys()
    for result in results:
        for name, x in result["test_wrappers"][case].items():
            assert torch.equal(x, first[name]), name
            torch.testing.assert_close(x, expected[name], atol=ATOL, rtol=0)


def test_the_cases_differ(results: list[dict[str, Any]]) -> None:
    """Loading matters: the codes then are not those that data gave."""
    found = results[0]["test_wrappers"]
    name = "quantizer.ema_codebook.codes"
    assert not torch.allclose(found["ddp"][name], found["rank 0 has loaded"][name])
