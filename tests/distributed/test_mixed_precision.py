"""FSDP2 with mixed precision, two gloo processes: the codebook stays float32, and one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from mmvq import MultiModalEMAQuantizer

RANKS, STEPS, B, T, D, L = 2, 8, 4, 3, 8, 6
NAMES = ("audio", "video")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({m: nn.Linear(D, D) for m in NAMES})
        self.quantizer = MultiModalEMAQuantizer(D, L, NAMES, reset_after=3, init="kmeans")
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        z = {m: self.encoders[m](x[m]) for m in NAMES}
        self.seen = {m: y.detach() for m, y in z.items()}
        quantized, _, loss = self.quantizer(z)
        return loss + sum(q.float().square().mean() for q in quantized.values())


def work(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    torch.manual_seed(0)
    model = Model()
    fresh = copy.deepcopy(model.quantizer.state_dict())
    mesh = init_device_mesh("cpu", (RANKS,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in (*model.encoders.values(), model.quantizer, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    states, features, losses = [], [], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(RANKS * step + rank)
        loss = model({m: torch.randn(B, T, D, generator=generator) for m in NAMES})
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
        features.append(model.seen)
        states.append({k: x.clone() for k, x in model.quantizer.state_dict().items()})
    out = {"fresh": fresh, "states": states, "features": features, "losses": losses}
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(RANKS)]


def test_features_are_narrow_and_the_state_is_not(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert all(x.dtype == torch.bfloat16 for step in rank["features"] for x in step.values())
        assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in rank["losses"])
        for state in rank["states"]:
            floats = [x for x in state.values() if x.is_floating_point()]
            assert {x.dtype for x in floats} == {torch.float32}
            assert all(x.isfinite().all() for x in floats)


def test_the_state_is_the_same_bits_on_both_ranks(ranks: list[dict[str, Any]]) -> None:
    for mine, other in zip(*(rank["states"] for rank in ranks), strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_the_state_is_that_of_one_process_in_float64(ranks: list[dict[str, Any]]) -> None:
    """On the features of both ranks, of entries below 8: sums of 2 * 12 rows a rank and 3 roundings
    a step in float32, over STEPS steps, on means whose denominators are at least N / 2 = 1 / 2.
    """
    alone = MultiModalEMAQuantizer(D, L, NAMES, reset_after=3, init="kmeans")
    alone.load_state_dict(ranks[0]["fresh"])
    atol = 2 * 8 * torch.finfo(torch.float32).eps / 2 * STEPS * (2 * RANKS * B * T + 3)
    for step in range(STEPS):
        parts = [rank["features"][step] for rank in ranks]
        z = {m: torch.cat([part[m] for part in parts]) for m in NAMES}
        assert all(x.abs().max() < 8 for x in z.values())
        alone({m: x.double() for m, x in z.items()})
        state = ranks[0]["states"][step]
        for name, value in alone.state_dict().items():
            wanted = value.double()
            torch.testing.assert_close(state[name].double(), wanted, atol=atol, rtol=0)
