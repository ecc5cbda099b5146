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


def record(work: Callable[[], object], capability: int = 90) -> list[Launch]:
    """The launches that `work` makes on fake tensors of a device; nothing runs."""
    from mmvq_kernels.gpu import launching

    launches: list[Launch] = []
    original = launching.launch, launching.capability
    launching.capability = lambda like: capability
    launching.launch = lambda kernel, grid, *args, **options: (
        launches.append(Launch(kernel, grid, args, options)) if 0 not in grid else None
    )
    try:
        with FakeTensorMode():
            work()
    finally:
        launching.launch, launching.capability = original
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


def filtered(N: int, L: int, D: int) -> None:
    """`nearest_code`, where a filter comes first; three stages of D 256 are too much."""
    from mmvq_kernels.gpu.nearest import search_with_ticket
    from mmvq_kernels.gpu.tiles import Tile

    search_with_ticket(fake(N, D), fake(L, D), force_filter=Tile(128, 128, 8, 2 if D == 256 else 3))


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


def step(G: int, L: int, D: int, rule: str = "all") -> None:
    """One step of the whole state of a codebook."""
    from mmvq_kernels.gpu.ema import step_

    integers = (fake(G, L, dtype=torch.int64) for _ in range(2))
    state = fake(L, D), fake(L, D), fake(L), *integers, fake(1, dtype=torch.int64)
    step_(*state, fake(G * L + L * D), 0.99, 1e-5, 100.0, rule, None)


def mix(
    M: int,
    B: int,
    T: int,
    D: int,
    partner: str = "attention",
    masked: bool = False,
    temperature: float | None = None,
    dtype: Any = _F,
) -> None:
    """What vectors of several modalities add."""
    from mmvq_kernels.gpu.mixing import mix

    N = M * B * T
    valid = fake(N, dtype=torch.bool) if masked else None
    mix(fake(N, D, dtype=dtype), valid, B, [*range(M)], partner, 0.5, temperature)


def quantize(
    M: int,
    P: int,
    L: int,
    D: int,
    masked: bool = False,
    rotation: bool = False,
    dtype: torch.dtype = _F,
) -> None:
    """The commitment loss of several modalities, forward and backward."""
    from mmvq_kernels.gpu.commitment import backward, forward

    rows, valid = fake(M * P, D, dtype=dtype), fake(M * P, dtype=torch.bool) if masked else None
    out, chosen, _, loss, weights = forward(rows, fake(L, D), valid, M, 0.25, 0.125, True)
    backward(rows, chosen, valid, weights, out, loss, rotation)


def log_probabilities(B: int, T: int, L: int, D: int) -> None:
    """`code_log_probabilities`, forward."""
    from mmvq_kernels.gpu.distribution import forward

    forward(fake(B, T, D), fake(L, D), fake(B, T, dtype=torch.bool))


def gradients(B: int, T: int, L: int, D: int) -> None:
    """`code_log_probabilities`, backward."""
    from mmvq_kernels.gpu.distribution import backward

    x, codebook, mask = fake(B, T, D), fake(L, D), fake(B, T, dtype=torch.bool)
    backward(fake(B, L), x, codebook, mask, fake(B, L), fake(B, T), True)


def distribution(B: int, T: int, L: int, D: int) -> None:
    """`code_log_probabilities`, forward and backward."""
    log_probabilities(B, T, L, D)
    gradients(B, T, L, D)


WORKLOADS: dict[str, Callable[[], object]] = {
    "nearest": lambda: search(65536, 1024, 256),
    "nearest, few rows": lambda: search(1600, 400, 256),
    "nearest, D 4": lambda: search(65536, 1024, 4),
    "nearest, D 32": lambda: search(65536, 1024, 32),
    "nearest, D 64": lambda: search(65536, 1024, 64),
    "nearest, D 128": lambda: search(65536, 1024, 128),
    "nearest, few rows, D 128": lambda: search(1600, 400, 128),
    "nearest, few rows, D 64": lambda: search(1600, 400, 64),
    "nearest, fast, D 64": lambda: search(65536, 1024, 64, fast=True),
    "nearest, odd sizes": lambda: search(1601, 401, 257),
    "nearest, bf16": lambda: search(65536, 1024, 256, _B),
    "nearest, fp16": lambda: search(65536, 1024, 256, _H, _H),
    "nearest, few rows, D 8": lambda: search(1601, 401, 8),
    "nearest, fast": lambda: search(65536, 1024, 256, fast=True),
    "nearest, filter": lambda: filtered(65536, 8192, 256),
    "nearest, filter, D 64": lambda: filtered(65536, 8192, 64),
    "nearest, filter, D 512": lambda: filtered(65536, 8192, 512),
    "statistics": lambda: statistics(65536, 1024, 256),
    "statistics, few rows": lambda: statistics(1600, 400, 256),
    "statistics, many codes": lambda: statistics(1600, 8192, 256),
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
    "step": lambda: step(2, 400, 256),
    "step, odd sizes": lambda: step(3, 401, 257, "any"),
    "step, D 4": lambda: step(2, 8192, 4),
    "step, many groups": lambda: step(32, 401, 4),
    "mix": lambda: mix(2, 80, 10, 256),
    "mix, T 32": lambda: mix(2, 80, 32, 256, masked=True),
    "mix, T 100": lambda: mix(3, 80, 100, 256),
    "mix, T 40, D 8": lambda: mix(2, 80, 40, 8),
    "mix, temperature": lambda: mix(2, 80, 10, 256, temperature=16.0),
    "mix, odd sizes": lambda: mix(3, 7, 11, 257, masked=True),
    "mix, D 8": lambda: mix(2, 80, 10, 8),
    "mix, bf16": lambda: mix(2, 80, 10, 256, dtype=_B),
    "mix, aligned": lambda: mix(2, 80, 10, 256, "aligned"),
    "mix, none": lambda: mix(1, 80, 10, 256, "none"),
    "commitment": lambda: quantize(2, 800, 400, 256),
    "commitment, odd sizes": lambda: quantize(3, 533, 401, 257, masked=True, rotation=True),
    "commitment, many rows": lambda: quantize(2, 20_000, 400, 257, masked=True),
    "commitment, D 8": lambda: quantize(2, 800, 400, 8, rotation=True),
    "commitment, bf16": lambda: quantize(2, 65536, 400, 256, dtype=_B),
    "distribution": lambda: log_probabilities(80, 10, 1024, 256),
    "distribution, odd sizes": lambda: log_probabilities(17, 11, 401, 257),
    "distribution, D 8": lambda: log_probabilities(17, 11, 401, 8),
    "distribution, backward": lambda: gradients(80, 10, 1024, 256),
    "distribution, backward, odd sizes": lambda: gradients(17, 11, 401, 257),
    "distribution, backward, D 8": lambda: gradients(17, 11, 401, 8),
}
