"""What many tests need: dtypes, draws, states, and the rounding that tolerances come from."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


def peak_growth(setup: str, call: str) -> int:
    """MiB by which `call` raises the peak memory of a process that has run `setup`."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    code = (
        "import re, torch, mmvq, mmvq_kernels\n"
        "def peak():  # ru_maxrss would hold the parent's\n"
        "    return int(re.findall(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[0])\n"
        f"{setup}\nbefore = peak()\n{call}\nprint(peak() - before)\n"
    )
    return int(run_python("-c", code)) // 1024


def run_python(*arguments: str, timeout: float = 600, **environment: str) -> str:
    """What a python process of its own prints, on the packages and examples of this tree.

    An installed mmvq may be that of another one. AssertionError, with all it said, if it fails.
    """
    root = Path(__file__).parents[1]
    paths = os.pathsep.join(str(root / part) for part in (".", "examples", "tests"))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *arguments]
    process = subprocess.Popen(
        command,
        cwd=root,
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
