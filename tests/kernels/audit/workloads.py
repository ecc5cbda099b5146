"""Launches to compile and to count: what the kernels would do on a GPU that is not here.

`record` runs an operation on fake CUDA tensors, which have shapes and no data. So it also proves
that nothing on the way to a launch looks at data: a fake tensor raises where one would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


def record(work: Callable[[], object]) -> list[Launch]:
    """The launches that `work` makes on fake tensors; nothing runs."""
    from mmvq_kernels.gpu import launching

    launches: list[Launch] = []
    original = launching.launch
    launching.launch = lambda kernel, grid, *args, **options: (
        launches.append(Launch(kernel, grid, args, options)) if 0 not in grid else None
    )
    try:
        with FakeTensorMode():
            work()
    finally:
        launching.launch = original
    return launches


def fake(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor on a GPU, of no content; for use inside `record`."""
    return torch.empty(shape, dtype=dtype, device="cuda")


_F, _B, _H = torch.float32, torch.bfloat16, torch.float16


def search(
    N: int, L: int, D: int, dtype: torch.dtype = _F, codes: torch.dtype = _F, fast: bool = False
) -> None:
    """`nearest_code`."""
    from mmvq_kernels.gpu.nearest import search

    search(fake(N, D, dtype=dtype), fake(L, D, dtype=codes), fast)


def statistics(N: int, L: int, D: int, dtype: torch.dtype = _F, deterministic: bool = True) -> None:
    """`code_statistics` of two groups."""
    from mmvq_kernels.gpu.statistics import accumulate

    indices, groups = fake(N, dtype=torch.int64), fake(N, dtype=torch.int64)
    accumulate(fake(N, D, dtype=dtype), indices, L, groups, 2, deterministic=deterministic)


def average(L: int, D: int, reset: bool = True) -> None:
    """`ema_update_`."""
    from mmvq_kernels.gpu.ema import update_

    dead = fake(L, dtype=torch.bool) if reset else None
    replacement = fake(L, D) if reset else None
    state = fake(L, D), fake(L, D), fake(L)
    update_(*state, fake(L, D), fake(L), 0.99, 1e-5, dead, replacement)


def distribution(B: int, T: int, L: int, D: int) -> None:
    """`code_log_probabilities`, forward and backward."""
    from mmvq_kernels.gpu.distribution import backward, forward

    x, codebook, used = fake(B, T, D), fake(L, D), fake(B, T, dtype=torch.bool)
    log_p, normalizers = forward(x, codebook, used)
    backward(fake(B, L), x, codebook, used, log_p, normalizers, True)


WORKLOADS: dict[str, Callable[[], object]] = {
    "nearest": lambda: search(65536, 1024, 256),
    "nearest, few rows": lambda: search(1600, 400, 256),
    "nearest, D 4": lambda: search(65536, 1024, 4),
    "nearest, odd sizes": lambda: search(1601, 401, 257),
    "nearest, bf16": lambda: search(65536, 1024, 256, _B),
    "nearest, fp16": lambda: search(65536, 1024, 256, _H, _H),
    "nearest, few rows, bf16": lambda: search(1600, 400, 256, _B, _B),
    "nearest, few rows, D 8": lambda: search(1601, 401, 8),
    "nearest, few rows, fast bf16": lambda: search(1600, 400, 256, _B, _B, fast=True),
    "nearest, fast": lambda: search(65536, 1024, 256, fast=True),
    "nearest, fast bf16": lambda: search(65536, 1024, 256, _B, fast=True),
    "nearest, fast fp16": lambda: search(65536, 1024, 256, _H, fast=True),
    "statistics": lambda: statistics(65536, 1024, 256),
    "statistics, odd sizes": lambda: statistics(1601, 401, 257),
    "statistics, D 8": lambda: statistics(1601, 401, 8),
    "statistics, bf16": lambda: statistics(65536, 1024, 256, _B),
    "statistics, fp16": lambda: statistics(65536, 1024, 256, _H),
    "statistics, atomics": lambda: statistics(65536, 1024, 256, deterministic=False),
    "statistics, atomics, bf16": lambda: statistics(65536, 1024, 256, _B, deterministic=False),
    "ema": lambda: average(1024, 256, reset=False),
    "ema, reset": lambda: average(1024, 256),
    "ema, odd sizes": lambda: average(401, 257),
    "ema, D 4": lambda: average(401, 4),
    "distribution": lambda: distribution(80, 10, 1024, 256),
    "distribution, odd sizes": lambda: distribution(17, 11, 401, 257),
    "distribution, D 8": lambda: distribution(17, 11, 401, 8),
}
