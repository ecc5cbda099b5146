"""Several processes, one run: torchrun --nproc-per-node 2 examples/cmg_pretrain.py.

Every batch is split over the ranks; all they hold in common (weights, codebook, random generators,
order of the clips) stays the same on all, so that a run, and a run resumed on another number of
ranks, is that of one process to rounding. Rank 0 alone writes and speaks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from mmvq.distributed import rank, world_size


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Among the ranks that torchrun started; alone without it."""
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this is rank 0, or alone."""
    return os.environ.get("RANK", "0") == "0"


def share(batch: Tensor) -> Tensor:
    """The part of a batch that is this rank's; they are equal."""
    return batch.chunk(world_size())[rank()]
