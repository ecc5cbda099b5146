"""The Triton kernels themselves, on a GPU where there is one, in Triton's interpreter otherwise.

Interpreted and compiled kernels cannot share a process: without a GPU these files run only where
TRITON_INTERPRET=1 was set before triton was imported, which `tests/kernels/test_interpreter.py`
sees to. With a GPU they are collected as they are, marked `gpu`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not INTERPRETED and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def like_the_hardware(request: pytest.FixtureRequest) -> Iterator[None]:
    """Mend what the interpreter gets wrong; let overflow pass silently, as it does on a GPU."""
    if not INTERPRETED or "stock" in request.fixturenames:
        yield
        return
    from kernels.interpreter import mend

    with np.errstate(all="ignore"), pytest.MonkeyPatch.context() as patch:
        mend.mend(patch)
        yield


@pytest.fixture
def stock() -> None:
    """Leaves the interpreter as it comes."""
