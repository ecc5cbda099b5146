"""One training run on several processes: torchrun --nproc-per-node 2 examples/cmg_pretrain.py.

Each batch is split over the ranks. Weights, codebook, random state and the order of the clips are
the same on all ranks, so the result equals that of one process up to floating-point error, also
when a run is resumed on another number of ranks. Only rank 0 writes files and prints.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from mmvq.distributed import rank, world_size

from .errors import DataError


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the process group if torchrun started this process."""
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


def local_device(name: str) -> torch.device:
    """The device of this process: "auto", "cpu", or "cuda" for the GPU of its local rank.

    Raises:
        DataError: There is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        number = torch.zeros((), device=name)
        number.item()  # fails on "meta"
        return number.device
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {name}: torch cannot use it here ({error}).") from error


def is_first() -> bool:
    """Whether this process is rank 0, or runs alone."""
    return os.environ.get("RANK", "0") == "0"


def local_part(batch: Tensor) -> Tensor:
    """This rank's equal part of a batch."""
    return batch.chunk(world_size())[rank()]


def from_first_rank(x: Tensor) -> Tensor:
    """The tensor of rank 0, of any length [L, ...], on all ranks."""
    if world_size() == 1:
        return x
    length = x.new_tensor(len(x), dtype=torch.long)
    dist.broadcast(length, 0)
    x = x if rank() == 0 else x.new_empty(int(length), *x.shape[1:])
    dist.broadcast(x, 0)
    return x
