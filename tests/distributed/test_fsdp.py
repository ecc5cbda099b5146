"""FSDP1 and FSDP2 with narrow dtypes, two gloo processes: no bit of the state is lost."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import gloo, run_ranks, same
from torch import Tensor, nn

from mmvq import MultiModalEMAQuantizer

RANKS, STEPS, B, T, D, L = 2, 12, 4, 3, 8, 6
NAMES = ("audio", "video")
DECAY = 0.9
State = dict[str, Tensor]


class Model(nn.Module):
    """Features near 3, where neighbours in bfloat16 are 1/64 apart."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({m: nn.Linear(D, D) for m in NAMES})
        self.quantizer = MultiModalEMAQuantizer(D, L, NAMES, decay=DECAY, reset_after=3)
        self.seen: State = {}

    def forward(self, x: State) -> Tensor:
        z = {m: self.encoders[m](x[m]) + 3 for m in NAMES}
        self.seen = {m: y.detach() for m, y in z.items()}
        quantized, _, loss = self.quantizer(z)
        return loss + sum(q.float().square().mean() for q in quantized.values())


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def batch(step: int, rank: int) -> State:
    generator = torch.Generator().manual_seed(RANKS * step + rank)
    return {m: torch.randn(B, T, D, generator=generator) for m in NAMES}


def copy(module: nn.Module) -> State:
    """Of its buffers as they are, not as `state_dict` gives them."""
    return {name: x.detach().clone() for name, x in module.named_buffers()}


def saved(whole: State) -> State:
    """What a state_dict of the model holds of the quantizer."""
    inside = {name.partition("quantizer.")[2]: x for name, x in whole.items()}
    return {name: x.clone() for name, x in inside.items() if name}


def train(wrapped: nn.Module, inside: Model, rank: int, between: Callable[[], None]) -> Any:
    optimiser = torch.optim.SGD(wrapped.parameters(), 0.01)
    states, features, losses = [], [], []
    for step in range(STEPS):
        loss = wrapped(batch(step, rank))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
        features.append(inside.seen)
        states.append(copy(inside.quantizer))
        between()
    return {"states": states, "features": features, "losses": losses}


def fsdp1(rank: int) -> Iterator[tuple[str, Any]]:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import MixedPrecision, StateDictType

    policies = {
        "buffers": MixedPrecision(buffer_dtype=torch.bfloat16),
        "all": MixedPrecision(  # what Lightning's plugin for "bf16-mixed" sets
            param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16
        ),
    }

    def wrap(inside: Model, policy: str = "all", orig: bool = True) -> nn.Module:
        device, precision = torch.device("cpu"), policies[policy]
        return FSDP(inside, device_id=device, mixed_precision=precision, use_orig_params=orig)

    for policy in policies:
        inside = model()
        fresh = copy(inside.quantizer)
        run = train(wrap(inside, policy), inside, rank, lambda: None)
        yield f"fsdp1 {policy}", run | {"fresh": fresh}

    # FSDP casts buffers up in eval mode and down again afterwards
    os.environ["FSDP_USE_FULL_PREC_IN_EVAL"] = "1"
    inside = model()
    fresh, wrapped = copy(inside.quantizer), wrap(inside)
    evaluated: list[bool] = []

    def evaluate() -> None:
        before = copy(inside.quantizer)
        wrapped.eval()(batch(0, rank))
        evaluated.append(same(copy(inside.quantizer), before))
        wrapped.train()

    run = train(wrapped, inside, rank, evaluate)
    yield "fsdp1 eval", run | {"fresh": fresh, "evaluated": evaluated}
    del os.environ["FSDP_USE_FULL_PREC_IN_EVAL"]
    trained = copy(inside.quantizer)

    # a loaded codebook, whose values bfloat16 does not have, before and after the first use
    inside = model()
    inside.quantizer.load_state_dict(trained)
    wrapped = wrap(inside)
    before = saved(wrapped.state_dict())
    wrapped.eval()(batch(0, rank))
    after = copy(inside.quantizer)
    yield "fsdp1 loaded", {"wanted": trained, "before": before, "after": after}

    # saved and loaded by each kind of state_dict, by a model that runs already and by a new one
    kinds = {
        "full": StateDictType.FULL_STATE_DICT,
        "sharded": StateDictType.SHARDED_STATE_DICT,
        "local": StateDictType.LOCAL_STATE_DICT,
    }
    for name, kind in kinds.items():
        orig = name != "local"  # with them torch cannot load what it saved
        source = model()
        source.quantizer.load_state_dict(trained)
        giver = wrap(source, orig=orig)
        giver(batch(0, rank))
        wanted, loaded = copy(source.quantizer), []
        for running in (False, True):
            target = model()
            taker = wrap(target, orig=orig)
            if running:
                taker(batch(1, rank))
            with FSDP.state_dict_type(giver, kind):
                file = giver.state_dict()
            with FSDP.state_dict_type(taker, kind):
                taker.load_state_dict(file)
            loaded.append(copy(target.quantizer))
            taker.eval()(batch(0, rank))
            loaded.append(copy(target.quantizer))
        out = {"wanted": wanted, "file": saved(file), "loaded": loaded}
        yield f"fsdp1 {name}", out | {"source": copy(source.quantizer)}


def fsdp2(rank: int, folder: Path) -> Iterator[tuple[str, Any]]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))

    def shard(inside: Model) -> Model:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for part in (*inside.encoders.values(), inside.quantizer, inside):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        return inside

    source = shard(model().bfloat16())  # the whole model narrow, before it is sharded
    fresh = copy(source.quantizer)
    yield "fsdp2", train(source, source, rank, lambda: None) | {"fresh": fresh}
    wanted = copy(source.quantizer)

    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    file = get_model_state_dict(source, options=full)  # of rank 0 alone
    yield "fsdp2 file", {"wanted": wanted, "file": saved(file)}
    loaded = []
    with torch.device("meta"):  # as large models start; rank 1 has no file
        target = shard(Model().bfloat16())
    target.to_empty(device="cpu")
    sent = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(target, file if rank == 0 else {}, options=sent)
    loaded.append(copy(target.quantizer))
    target(batch(0, rank))  # and it runs
    steps = int(target.quantizer.ema_codebook.steps)

    dcp.save({"model": get_model_state_dict(source)}, checkpoint_id=f"{folder}/checkpoint")
    again = shard(model().bfloat16())
    state = {"model": get_model_state_dict(again)}
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
    set_model_state_dict(again, state["model"])
    loaded.append(copy(again.quantizer))
    yield "fsdp2 loaded", {"wanted": wanted, "loaded": loaded, "steps": steps}


def sent(rank: int) -> Iterator[tuple[str, Any]]:
    """A module with a group of its own, pickled by rank 0."""
    group = dist.new_group([0, 1])
    module = MultiModalEMAQuantizer(D, L, NAMES, process_group=group)
    mail = [pickle.dumps(module) if rank == 0 else None]
    dist.broadcast_object_list(mail, src=0)
    assert mail[0] is not None
    again = pickle.loads(mail[0])
    again(batch(0, rank))
    found = again.ema_codebook.process_group is group
    yield "sent", {"found": found, "state": copy(again)}


def work(rank: int, folder: Path) -> dict[str, Any]:
    with gloo(rank, RANKS, folder):
        return dict([*fsdp1(rank), *fsdp2(rank, folder), *sent(rank)])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(tmp_path_factory, RANKS, work)


RUNS = ("fsdp1 buffers", "fsdp1 all", "fsdp1 eval", "fsdp2")
FILES = ("fsdp1 full", "fsdp1 sharded", "fsdp1 local", "fsdp2 loaded")


@pytest.mark.parametrize("run", RUNS)
def test_features_are_narrow_and_the_state_is_not(ranks: list[dict[str, Any]], run: str) -> None:
    wanted = torch.float32 if run == "fsdp1 buffers" else torch.bfloat16
    for rank in ranks:
        assert {x.dtype for step in rank[run]["features"] for x in step.values()} == {wanted}
        assert all(x.dtype == torch.float32 and x.isfinite() for x in rank[run]["losses"])
        for state in rank[run]["states"]:
            assert {x.dtype for x in state.values()} == {torch.float32, torch.int64}
            assert all(x.isfinite().all() for x in state.values())


@pytest.mark.parametrize("run", RUNS)
def test_the_state_is_the_same_bits_on_both_ranks(ranks: list[dict[str, Any]], run: str) -> None:
    for mine, other in zip(*(rank[run]["states"] for rank in ranks), strict=True):
        assert same(mine, other)


@pytest.mark.parametrize("run", RUNS)
def test_the_state_is_that_of_one_process_in_float64(ranks: list[dict[str, Any]], run: str) -> None:
    """On the features of both ranks, of entries below 8: sums of 2 * 12 rows a rank and 3 roundings
    a step in float32, in the sums and in the counts that divide them, over STEPS steps: 6e-4.
    One rounding of N or e to bfloat16 is off by up to 4 / 2^8 = 2e-2.
    """
    alone = MultiModalEMAQuantizer(D, L, NAMES, decay=DECAY, reset_after=3)
    alone.load_state_dict(ranks[0][run]["fresh"])
    atol = 2 * 8 * torch.finfo(torch.float32).eps / 2 * STEPS * (2 * RANKS * B * T + 3)
    for step, state in enumerate(ranks[0][run]["states"]):
        parts = [rank[run]["features"][step] for rank in ranks]
        z = {m: torch.cat([part[m] for part in parts]) for m in NAMES}
        assert all(x.abs().max() < 8 for x in z.values())
        alone({m: x.double() for m, x in z.items()})
        for name, wanted in alone.named_buffers():
            torch.testing.assert_close(state[name].double(), wanted.double(), atol=atol, rtol=0)


def test_evaluation_changes_no_bit(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["fsdp1 eval"]["evaluated"] == [True] * STEPS


def test_a_loaded_codebook_is_what_was_loaded(ranks: list[dict[str, Any]]) -> None:
    """In a file written before the first use, and after it."""
    for rank in ranks:
        run = rank["fsdp1 loaded"]
        assert not same(run["wanted"], narrowed(run["wanted"]))  # there is something to lose
        assert same(run["before"], run["wanted"])
        assert same(run["after"], run["wanted"])


@pytest.mark.parametrize("run", FILES)
def test_files_bring_every_bit_back(ranks: list[dict[str, Any]], run: str) -> None:
    for rank in ranks:
        wanted, loaded = rank[run]["wanted"], rank[run]["loaded"]
        assert not same(wanted, narrowed(wanted))
        assert len(loaded) > 1
        assert all(same(state, wanted) for state in loaded)


@pytest.mark.parametrize("run", ["fsdp1 full", "fsdp1 sharded", "fsdp1 local"])
def test_saving_reads_every_bit_and_changes_none(ranks: list[dict[str, Any]], run: str) -> None:
    for rank in ranks:
        assert same(rank[run]["file"], rank[run]["wanted"])
        assert same(rank[run]["source"], rank[run]["wanted"])


def test_a_full_file_of_fsdp2_and_a_model_that_began_on_meta(ranks: list[dict[str, Any]]) -> None:
    assert same(ranks[0]["fsdp2 file"]["file"], ranks[0]["fsdp2 file"]["wanted"])
    assert [rank["fsdp2 loaded"]["steps"] for rank in ranks] == [STEPS + 1] * RANKS


def test_a_pickled_module_finds_its_group_in_another_process(ranks: list[dict[str, Any]]) -> None:
    assert [rank["sent"]["found"] for rank in ranks] == [True] * RANKS
    assert same(*(rank["sent"]["state"] for rank in ranks))


def narrowed(state: State) -> State:
    """As bfloat16 would have it."""
    return {n: x.bfloat16().to(x) if x.is_floating_point() else x for n, x in state.items()}
