"""What many tests need: dtypes, draws, states, tolerances from rounding, and other processes."""

from __future__ import annotations

import multiprocessing.forkserver
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ROOT = Path(__file__).parents[1]
PATIENCE = timedelta(minutes=5)  # until a rank that waits in vain gives up
PATHS = os.pathsep.join(str(ROOT / part) for part in (".", "examples", "tests"))


def rounding(dtype: torch.dtype, operations: int, scale: float = 1.0) -> float:
    """Bound on the error of a chain of `operations` roundings of values up to `scale`."""
    return operations * torch.finfo(dtype).eps * scale


def uniform(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Values in [-1, 1), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1).to(dtype)


def bools(*shape: int, share: float = 0.7, seed: int = 0) -> Tensor:
    """True with probability `share`."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def strided(x: Tensor) -> Tensor:
    """The same values with a gap between neighbours in every dimension but the first."""
    gaps = x.new_full([n * (2 if d else 1) for d, n in enumerate(x.shape)], torch.nan)
    view = gaps[(slice(None), *(slice(None, None, 2),) * (x.ndim - 1))]
    view.copy_(x)
    assert x.numel() < 2 or x.ndim < 2 or not view.is_contiguous()
    return view


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics and losses of `dtype` are computed in."""
    return torch.promote_types(dtype, torch.float32)


def state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of its state_dict."""
    return {name: x.clone() for name, x in module.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """The same names, dtypes and bits."""
    names = a.keys() | b.keys()
    return all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in names)


def close(actual: Tensor, expected: Tensor | float | list[float], atol: float) -> None:
    """Within `atol`, nothing relative, whatever the two dtypes are."""
    wanted = torch.as_tensor(expected, dtype=torch.float64).detach()
    torch.testing.assert_close(actual.detach().double(), wanted, atol=atol, rtol=0)


# Other processes


@cache
def start_method() -> str:
    """How child processes start: as copies of one that has imported the packages of this tree.

    coverage.py measures only processes that start anew.
    """
    if "COVERAGE_PROCESS_START" in os.environ:
        return "spawn"
    multiprocessing.set_forkserver_preload(["pytest", "mmvq", "torch.distributed.fsdp"])
    with patch.dict(os.environ, PYTHONPATH=PATHS, OMP_NUM_THREADS="1"):
        multiprocessing.forkserver.ensure_running()
    return "forkserver"


def run_processes(count: int, work: Callable[..., None], *arguments: object) -> None:
    """Call `work(i, *arguments)` in each of `count` processes. Raises if one of them does."""
    mp.start_processes(work, arguments, count, start_method=start_method())


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills once, however many workers of a parallel run ask for it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    try:
        folder.mkdir()
    except FileExistsError:
        while not (folder / "done").exists():
            time.sleep(0.1)
    else:
        try:
            make(folder)
        finally:
            (folder / "done").touch()
    return folder


def run_ranks(
    factory: pytest.TempPathFactory, count: int, work: Callable[[int, Path], Any]
) -> list[Any]:
    """What `work(rank, folder)` returns on each rank; run once for all workers."""
    folder = once(factory, work.__module__, lambda at: run_processes(count, _keep, work, at))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _keep(rank: int, work: Callable[[int, Path], Any], folder: Path) -> None:
    torch.save(work(rank, folder), folder / f"{rank}.pt")


@contextmanager
def gloo(rank: int, count: int, folder: Path) -> Iterator[None]:
    """The default process group of ranks that meet in this folder."""
    torch.set_num_threads(1)
    meet = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", meet, PATIENCE, rank=rank, world_size=count)
    yield
    dist.barrier()
    dist.destroy_process_group()


def peak_growth(setup: str, call: str) -> int:
    """MiB by which `call` raises the peak memory of a process that has run `setup`."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    growth = mp.get_context(start_method()).Value("q")
    run_processes(1, _measure, setup, call, growth)
    return int(growth.value) // 1024


def _measure(_: int, setup: str, call: str, growth: Any) -> None:
    import mmvq
    import mmvq_kernels

    names = {"torch": torch, "mmvq": mmvq, "mmvq_kernels": mmvq_kernels}
    torch.set_num_threads(1)
    exec(setup, names)
    before = _peak()
    exec(call, names)
    growth.value = _peak() - before


def _peak() -> int:
    """KiB; `ru_maxrss` would hold the parent's."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1])


def run_python(*arguments: str, timeout: float = 600, **environment: str) -> str:
    """What a python process of its own prints, on the packages and examples of this tree.

    An installed mmvq may be that of another one. AssertionError, with all it said, if it fails.
    """
    environment = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *arguments]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    late = ""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        late = f" after {timeout} s, which was too long"
        process.kill()
        out, err = process.communicate()
    ended = f"{command} ended with {process.returncode}{late}"
    assert process.returncode == 0, f"{ended}\n--- stdout\n{out}\n--- stderr\n{err}"
    return out
