"""A rank that fails or is killed ends the others with an error; nobody waits for it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from support import gloo, start_method

import mmvq

RANKS = 3
LIMIT = 200  # seconds, less than a rank that nobody answers waits


def work(rank: int, folder: Path, fault: str) -> None:
    """Train; the last rank meets the fault at its third step. The others write what ends them."""
    with gloo(rank, RANKS, folder):
        module = mmvq.MultiModalEMAQuantizer(4, 8)
        try:
            for step in range(1000):
                z = torch.randn(2, 5, 4)
                if rank == RANKS - 1 and step == 2:
                    if fault == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    z = z[..., :3]  # refused here, and nowhere else
                module({"audio": z, "video": z})
        except (RuntimeError, ValueError) as error:
            (folder / str(rank)).write_text(f"{type(error).__name__} at step {step}: {error}")
            os._exit(1)  # gloo may abort when Python takes it apart after a failure


@pytest.mark.parametrize("fault", ["killed", "wrong shape"])
def test_one_rank_down_ends_all(fault: str, tmp_path: Path) -> None:
    context = mp.get_context(start_method())
    ranks = [context.Process(target=work, args=(r, tmp_path, fault)) for r in range(RANKS)]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(LIMIT)
        assert [process.exitcode for process in ranks[:-1]] == [1, 1]
        assert ranks[-1].exitcode == (-signal.SIGKILL if fault == "killed" else 1)
    finally:
        for process in ranks:
            process.kill()
    for rank in range(RANKS - 1):
        assert (tmp_path / str(rank)).read_text().startswith("RuntimeError at step 2: ")
    if fault == "wrong shape":
        assert "ValueError at step 2: Multi" in (tmp_path / str(RANKS - 1)).read_text()
