"""The search of narrow vectors by numba: the same codes as by a product. Also without numba."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import rounding, uniform
from torch import Tensor

from mmvq_kernels import narrow, nearest_code
from mmvq_kernels.nearest import _best, nearest_code_ref


@pytest.fixture(params=["numba", "python"], autouse=True)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, or as Python runs it, where numba is not installed."""
    if request.param == "numba":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(narrow, "_compiled", lambda: _quietly)
        monkeypatch.setattr(narrow, "_LANES", 16)
    monkeypatch.setattr(narrow, "_LEAST", 0)


def best(
    x: Tensor, codes: Tensor, bias: Tensor, by: Callable[..., None] = narrow.best
) -> tuple[Tensor, Tensor]:
    score, code = torch.empty(len(x)), torch.empty(len(x), dtype=torch.long)
    by(x, codes, bias, score, code)
    return score, code


def _quietly(*arrays: Any) -> None:
    with np.errstate(invalid="ignore"):  # compiled, it says nothing of a NaN
        narrow._search(*arrays)


@pytest.mark.parametrize(("N", "L", "D"), [(1, 1, 1), (16, 4, 8), (33, 7, 3), (50, 40, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_greatest_score_and_its_index(N: int, L: int, D: int, dtype: torch.dtype) -> None:
    x, codes = uniform(N, D).to(dtype), uniform(L, D, seed=1).float()
    bias = uniform(L, seed=2).float()
    greatest, index = best(x, codes, bias)
    exact = x.double() @ codes.double().T + bias
    slack = rounding(torch.float32, D + 1, D + 1)
    assert ((greatest - exact.amax(1)).abs() <= slack).all()
    assert (exact.gather(1, index[:, None])[:, 0] >= exact.amax(1) - 2 * slack).all()


def test_ties_go_to_the_lowest_index_and_nan_counts_as_least() -> None:
    codes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0], [-3.0, 1.0], [torch.nan, 0.0]])
    greatest, index = best(x, codes, torch.zeros(5))
    assert index.tolist() == [0, 0, 1, 4, 0]
    assert greatest.tolist() == [1.0, 1.0, 2.0, 3.0, -torch.inf]
    # a bias of -inf never wins
    assert best(x[:4], codes, torch.tensor([-torch.inf, 0, 0, 0, 0]))[1][0] == 2


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "_TASK", 40)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, codes, bias = uniform(50, 3).float(), uniform(9, 3, seed=1).float(), uniform(9).float()
    expected = best(x, codes, bias, _best)
    assert torch.equal(best(x, codes, bias)[1], expected[1])


def test_a_search_takes_it_and_chooses_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a lattice, with equal codes, ties, and rows and codes that are not finite."""
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randint(-3, 4, (70, 3), generator=generator).float()
    x = torch.randint(-8, 9, (100, 3), generator=generator).float() / 2
    codebook[40], codebook[0, 1] = codebook[7], torch.nan
    x[3, 2], x[9] = torch.inf, torch.nan
    expected = nearest_code_ref(x, codebook)
    expected[[3, 9]] = 0
    seen = []
    original = narrow.best
    monkeypatch.setattr(narrow, "best", lambda *a: seen.append(len(a[0])) or original(*a))
    assert torch.equal(nearest_code(x, codebook), expected)
    assert seen == [100]


def test_it_is_for_large_searches_of_narrow_float32_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x, codebook = torch.zeros(100, 8), torch.zeros(50, 8)
    assert narrow.takes(x, codebook)
    assert narrow.takes(x.bfloat16(), codebook)
    assert not narrow.takes(x, codebook.double())
    assert not narrow.takes(torch.zeros(100, 9), torch.zeros(50, 9))
    monkeypatch.setattr(narrow, "_LEAST", 5001)
    assert not narrow.takes(x, codebook)


@pytest.mark.parametrize("way", ["is missing", "knows another numpy", "is told not to compile"])
def test_without_numba_the_product_is_taken(way: str) -> None:
    script = "import os, sys, torch, types\n"
    if way == "is missing":
        script += "sys.modules['numba'] = None\n"
    elif way == "knows another numpy":
        script += (
            "class Refuses:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name == 'numba': raise ImportError('needs another numpy')\n"
            "sys.meta_path.insert(0, Refuses())\n"
        )
    else:
        script += "sys.modules['numba'] = types.SimpleNamespace(\n"
        script += "    config=types.SimpleNamespace(DISABLE_JIT=1))\n"
    script += (
        "from mmvq_kernels import narrow, nearest_code\n"
        "narrow._LEAST = 0\n"
        "assert not narrow.takes(torch.zeros(9, 2), torch.zeros(3, 2))\n"
        "assert nearest_code(torch.eye(9, 2), torch.eye(2)).tolist()[:2] == [0, 1]\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
