"""Four real processes over gloo, started once for all tests of this folder."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from support import PATIENCE, gloo, run_ranks

RANKS = 4
PROGRAMS = ("test_checkpointing", "test_codebook", "test_gather", "test_wrappers")
Results = list[dict[str, Any]]  # for each rank: program -> what it returned


def work(rank: int, folder: Path) -> dict[str, Any]:
    """One rank: all programs, first what they do before there is a group."""
    package = __name__.rpartition(".")[0]
    programs = {name: import_module(f"{package}.{name}") for name in PROGRAMS}
    early = {name: program.before_init() for name, program in programs.items()}
    with gloo(rank, RANKS, folder):
        # every rank makes each group
        pairs = [dist.new_group(ranks, PATIENCE) for ranks in ([0, 1], [2, 3])]
        return {
            name: program.run(rank, pairs[rank // 2], early[name])
            for name, program in programs.items()
        }


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank returned."""
    return run_ranks(tmp_path_factory, RANKS, work)
