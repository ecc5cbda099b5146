"""Four real processes over gloo, started once for all tests of this folder."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 4
PATIENCE = timedelta(minutes=5)  # until a rank that waits in vain gives up
PROGRAMS = ("test_checkpointing", "test_codebook", "test_gather", "test_wrappers")
Results = list[dict[str, Any]]  # for each rank: program -> what it returned


def work(rank: int, folder: str, package: str) -> None:
    """One rank: all programs, first what they do before there is a group."""
    torch.set_num_threads(1)
    programs = [import_module(f"{package}.{name}") for name in PROGRAMS]
    early = [program.before_init() for program in programs]
    store = f"file://{folder}/rendezvous"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=RANKS, timeout=PATIENCE
    )
    pairs = [dist.new_group(ranks, PATIENCE) for ranks in ([0, 1], [2, 3])]  # all make each group
    results = {
        name: program.run(rank, pairs[rank // 2], made)
        for name, program, made in zip(PROGRAMS, programs, early, strict=True)
    }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def shared_folder(base: Path) -> Path:
    """The same for all workers of a parallel run."""
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterable[Results]:
    """What each rank returned; of the workers of a parallel run, the first one starts them."""
    folder = shared_folder(tmp_path_factory.getbasetemp())
    try:
        folder.mkdir()
    except FileExistsError:
        while not (folder / "done").exists():
            time.sleep(0.1)
    else:
        try:
            package = __name__.rpartition(".")[0]
            mp.spawn(work, (str(folder), package), nprocs=RANKS)
        finally:
            (folder / "done").touch()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
