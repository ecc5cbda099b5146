"""The Triton kernels in the interpreter: the files of `interpreter/`, two to a process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
# How the interpreter of triton before 3.7 reads the ends of a loop, where numpy is before 2.
OLDER = "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
FILES = sorted((Path(__file__).parent / "interpreter").glob("test_*.py"))
PROCESSES = 5  # it takes 3 s to start one


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same files run on the GPU")
@pytest.mark.parametrize(
    "files",
    [FILES[i::PROCESSES] for i in range(PROCESSES)],
    ids=lambda files: " ".join(file.stem for file in files),
)
def test_interpreted(files: list[Path]) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", OLDER]
    command += [str(file) for file in files]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
