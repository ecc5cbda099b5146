"""Nearest codes of narrow vectors on a CPU, compiled by numba where it is installed.

A product of so few columns writes more scores than it computes with. Here they stay in registers.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from mmvq_kernels.checks import is_cpu_readable

_WIDTH = 8  # columns at most; fewer are padded
_LANES = 256  # vectors at a time, in the first cache
_LEAST = 1 << 19  # vectors times codes: those of a training step are. To compile takes a second
_TASK = 1 << 23  # vectors times codes that a thread takes at a time: a millisecond


def takes(x: Tensor, codebook: Tensor) -> bool:
    """Whether `best` takes these."""
    if not is_cpu_readable(codebook) or codebook.dtype != torch.float32:
        return False
    (N, D), L = x.shape, codebook.shape[0]
    return D <= _WIDTH and N * L >= _LEAST and _compiled() is not None


def best(x: Tensor, codes: Tensor, bias: Tensor, score: Tensor, code: Tensor) -> None:
    """Write the greatest `x . e + bias` of each row, fp32 `[N]`, and its lowest index, int64 `[N]`.

    A NaN counts as the least.
    """
    (N, D), L = x.shape, codes.shape[0]
    run = _compiled()
    assert run is not None
    padded = pad(codes, (0, _WIDTH - D, 0, -L % 4)).numpy()
    biases = pad(bias, (0, -L % 4), value=-torch.inf).numpy()
    tasks = max(1, N * L // _TASK)
    threads = min(torch.get_num_threads(), tasks)
    parts = zip(*(t.tensor_split(tasks) for t in (x, score, code)), strict=True)
    arrays = [(a.float().contiguous().numpy(), b.numpy(), c.numpy()) for a, b, c in parts]
    each = map if threads == 1 else _pool(threads, os.getpid()).map
    for _ in each(lambda part: run(part[0], padded, biases, *part[1:]), arrays):
        pass


@functools.lru_cache(1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Of this process: a fork has no threads."""
    return ThreadPoolExecutor(threads, "mmvq")


@functools.cache
def _compiled() -> Callable[..., None] | None:
    """`_search` by numba; None without it."""
    try:
        numba = importlib.import_module("numba")
    except ImportError:  # also of a numba that does not know this numpy
        return None
    if numba.config.DISABLE_JIT:
        return None
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    compiled: Callable[..., None] = numba.njit(**options)(_search)
    return compiled


def _search(
    x: NDArray[Any], codes: NDArray[Any], biases: NDArray[Any], greatest: Any, index: Any
) -> None:
    """Four codes at a time past `_LANES` vectors, which the compiler takes to be lanes."""
    N, D = x.shape
    rows = np.zeros((_WIDTH, _LANES), np.float32)
    best, place = np.empty(_LANES, np.float32), np.empty(_LANES, np.int32)
    for start in range(0, N, _LANES):
        length = min(_LANES, N - start)
        for i in range(length):
            for d in range(D):
                rows[d, i] = x[start + i, d]
        best[:], place[:] = -np.inf, 0
        for code in range(0, len(codes), 4):
            for i in range(_LANES):
                a, b, c, e = biases[code], biases[code + 1], biases[code + 2], biases[code + 3]
                for d in range(_WIDTH):
                    v = rows[d, i]
                    a += v * codes[code, d]
                    b += v * codes[code + 1, d]
                    c += v * codes[code + 2, d]
                    e += v * codes[code + 3, d]
                top, at = best[i], place[i]
                at, top = (np.int32(code), a) if a > top else (at, top)
                at, top = (np.int32(code + 1), b) if b > top else (at, top)
                at, top = (np.int32(code + 2), c) if c > top else (at, top)
                at, top = (np.int32(code + 3), e) if e > top else (at, top)
                best[i], place[i] = top, at
        for i in range(length):
            greatest[start + i], index[start + i] = best[i], place[i]
