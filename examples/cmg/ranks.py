"""One training run on several processes: torchrun --nproc-per-node 2 examples/cmg_pretrain.py.

The processes may be on several machines, which share the folder of the results.

Each batch is split over the ranks. Weights, codebook, random state and the order of the clips are
the same on all ranks, so the result equals that of one process up to floating-point error, also
when a run is resumed on another number of ranks. With masks, the commitment loss is the mean of the
means of the ranks, which differs a little from that of one process. Only rank 0 writes files and
prints.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
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
    # Optimizers import it. If that happens in a group, its threads outlive the group, and may abort
    # the process when it ends.
    importlib.import_module("torch._dynamo")
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


def on_all_ranks(act: Callable[[], int], device: torch.device, rule: str) -> None:
    """Call a function on every rank. All ranks fail if one does, or if the results differ.

    Args:
        act: The function; its result is 0 or more.
        device: Device of this rank.
        rule: Message of the ranks on which it did not fail.

    Raises:
        DataError: The function raised it, or `rule`.
    """
    error, result = None, -1
    try:
        result = act()
    except DataError as found:
        error = found
    if world_size() > 1:
        results = [torch.zeros((), dtype=torch.long, device=device) for _ in range(world_size())]
        dist.all_gather(results, torch.tensor(result, device=device))
        if error is None and len({int(x) for x in results}) > 1:
            error = DataError(rule)
    if error is not None:
        raise error
