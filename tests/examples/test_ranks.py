"""The example on two real processes over gloo: the run of one, its faults, and what it writes.

ATOL: training in float64. On two ranks a gradient is a sum of the same terms in another order, up
to 240 of size 10: it differs by 240 * 2^-53 * 10 = 3e-13 at most. AdamW divides it by its size, at
least 1e-6 where it matters (behind a batch normalisation a bias has none, and moves nothing), so a
step at rate 1e-3 moves a weight by 3e-10 more or less, and the 12 steps here move the losses by
less than 1e-7. Batch statistics or dropout of one rank alone would show at 1e-2.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from textwrap import dedent

import cmg_pretrain
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from examples.conftest import before_call, interrupt, make_arrays
from support import once, run_python, start_method

from cmg.batches import Batches
from cmg.checkpoint import load_checkpoint
from cmg.clips import Clips
from cmg.errors import DataError
from cmg.model import Config, UniCode
from cmg.ranks import on_all_ranks
from cmg.training import CHECKPOINT, History, Recipe, Trainer

ATOL = 1e-7
RANKS = 2
PATIENCE = 300  # seconds; nothing may wait for the 1,800 after which torch gives up
CONFIG = Config({"audio": (1, 7), "video": (4, 5)}, 6, dim=16, specific_dim=8, width=8)
RECIPE = Recipe(epochs=4, batch_size=8)
N, HELD_OUT = 24, 12
CODES = "quantizer.ema_codebook.codes"


def trainer(folder: Path) -> Trainer:
    torch.manual_seed(0)
    features = {
        name: torch.randn(N + HELD_OUT, 6, *shape, dtype=torch.float64)
        for name, shape in CONFIG.shapes.items()
    }
    model = UniCode(CONFIG).double()
    rows, held_out = torch.arange(N + HELD_OUT).split([N, HELD_OUT])
    return Trainer(model, Batches(Clips.of(features)), rows, held_out, RECIPE, folder, {})


def work(rank: int, folder: Path) -> None:
    """A whole run; then one in whose third epoch rank 1 is killed."""
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    whole = trainer(folder / "whole")
    history = whole.fit()
    torch.save({"history": history, "model": whole.model.state_dict()}, folder / f"{rank}.pt")

    cut = trainer(folder / "cut")
    if rank == 1:
        kill = partial(os.kill, os.getpid(), signal.SIGKILL)
        cut._step = before_call(2 * cut.steps + 2, kill, cut._step)  # type: ignore[method-assign]
    try:
        cut.fit()
    except RuntimeError as error:
        (folder / "ended").write_text(f"in epoch {cut.epoch}: {error}")
        raise SystemExit(1) from error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have been at work."""
    return once(tmp_path_factory, "example-ranks", work_and_be_killed)


def work_and_be_killed(folder: Path) -> None:
    context = mp.get_context(start_method())
    ranks = [context.Process(target=work, args=(rank, folder)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(PATIENCE)
        assert [process.exitcode for process in ranks] == [1, -signal.SIGKILL]
    finally:
        for process in ranks:
            process.kill()


def close(found: History, expected: History) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        for mine, value in zip(found[name], values, strict=True):
            assert math.isclose(mine, value, rel_tol=0, abs_tol=ATOL) or math.isnan(value)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    t = trainer(tmp_path_factory.mktemp("alone"))
    t.fit()
    return t


def test_two_ranks_train_as_one(folder: Path, alone: Trainer) -> None:
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS))
    assert repr(first["history"]) == repr(second["history"])
    assert all(torch.equal(x, second["model"][name]) for name, x in first["model"].items())
    close(first["history"], alone.history)
    expected = alone.model.state_dict()[CODES]
    torch.testing.assert_close(first["model"][CODES], expected, atol=ATOL, rtol=0)


def test_a_killed_rank_ends_the_run_and_leaves_its_checkpoint(folder: Path, alone: Trainer) -> None:
    """One process can go on from it."""
    assert (folder / "ended").read_text().startswith("in epoch 2: ")
    assert load_checkpoint(folder / "cut" / CHECKPOINT)["epoch"] == 2
    resumed = trainer(folder / "cut")
    close(resumed.fit(resume=True), alone.history)


def test_torchrun_writes_and_prints_once(clips_path: Path, tmp_path: Path) -> None:
    """A float32 loss is a mean of up to 240 terms below 10: its error is up to 240 * 2^-24 * 10."""
    options = ["--data", str(clips_path), "--epochs", "2", "--output"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    said = run_python(*launch, cmg_pretrain.__file__, *options, str(tmp_path / "two"))
    assert cmg_pretrain.main([*options, str(tmp_path / "one")]) == 0
    assert said.count("codes in use") == 1
    one, two = ({path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    one, two = (load_checkpoint(tmp_path / name / CHECKPOINT) for name in ("one", "two"))
    for name, values in one["history"].items():
        assert two["history"][name][0] == pytest.approx(values[0], abs=1.5e-4, nan_ok=True)


def test_two_machines_go_on_where_one_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two agents of torchrun, and clips that are read from a folder: the scores of one process.

    Both ranks measure the standardizer at the same time. The codebook begins after the stop.
    """
    data = tmp_path / "clips"
    data.mkdir()
    for name, array in make_arrays().items():
        np.save(data / f"{name}.npy", array)
    options = ["--data", str(data), "--epochs", "4", "--in-memory", "1e-9"]
    one, two = ([*options, "--output", str(tmp_path / name)] for name in ("one", "two"))
    assert cmg_pretrain.main([*one, "--workers", "0"]) == 0
    with monkeypatch.context() as user:
        user.setattr(Trainer, "_train_epoch", before_call(2, interrupt, Trainer._train_epoch))
        assert cmg_pretrain.main([*two, "--workers", "0"]) == 130
    assert load_checkpoint(tmp_path / "two" / CHECKPOINT)["epoch"] == 1
    shutil.rmtree(data / "standardizer")

    with socket.create_server(("127.0.0.1", 0)) as free:
        place = f"127.0.0.1:{free.getsockname()[1]}"
    launch = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    launch += ["--rdzv-backend=c10d", f"--rdzv-endpoint={place}", "--rdzv-id=test"]
    command = [*launch, cmg_pretrain.__file__, *two, "--workers", "1", "--resume"]
    with ThreadPoolExecutor(2) as machines:
        said = [*machines.map(lambda _: run_python(*command), range(2))]
    assert sorted(x.count("codes in use") for x in said) == [0, 1]
    expected, found = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")
    )
    assert found | {"seconds": 0} == expected | {"seconds": 0}
    expected, found = (
        load_checkpoint(tmp_path / name / CHECKPOINT)["history"] for name in ("one", "two")
    )
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=1.5e-4, nan_ok=True)


def test_no_thread_outlives_the_group() -> None:
    """One that still held a tensor when the process ended would abort it."""
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    code = """
        import glob, torch, torch.distributed as dist
        from cmg.ranks import joined
        def threads():
            return sum("gloo" in open(x).read() for x in glob.glob("/proc/self/task/*/comm"))
        with joined(torch.device("cpu")):
            torch.optim.AdamW([torch.ones(3, requires_grad=True)])
            dist.all_reduce(torch.ones(3))
            assert threads()
        print(threads())
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    assert run_python("-c", dedent(code), RANK="0", WORLD_SIZE="1", **place) == "0\n"


@pytest.mark.parametrize("epochs", [(2, 3), (2, -1)])
def test_all_ranks_fail_if_one_does(
    epochs: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 finds the checkpoint of epoch 2; the other that of another epoch, or none."""

    def gather(results: list[torch.Tensor], _: torch.Tensor) -> None:
        for result, epoch in zip(results, epochs, strict=True):
            result.fill_(epoch)

    def load() -> int:
        return 2

    on_all_ranks(load, torch.device("cpu"), "alone")
    monkeypatch.setattr("cmg.ranks.world_size", lambda: RANKS)
    monkeypatch.setattr(dist, "all_gather", gather)
    with pytest.raises(DataError, match="all machines share"):
        on_all_ranks(load, torch.device("cpu"), "all machines share")


def test_only_rank_0_speaks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert cmg_pretrain.main(["--data", "nowhere.npz", "--output", str(tmp_path)]) == 2
        assert capsys.readouterr().err.count("\n") == lines


def test_a_batch_without_equal_parts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmg.training.world_size", lambda: 3)
    with pytest.raises(DataError, match="a batch of 8 clips cannot be divided by 3 ranks"):
        trainer(tmp_path)
