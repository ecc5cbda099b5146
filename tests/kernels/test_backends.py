"""Which backend runs, and why one cannot."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from collections.abc import Callable
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import mmvq_kernels as kernels
from mmvq_kernels import backends

x = torch.ones(2, 3)


def average(backend: kernels.Backend) -> tuple[Tensor, ...]:
    state = x.clone(), 2 * x, torch.ones(2)
    kernels.ema_update_(*state, x, torch.ones(2), decay=0.9, backend=backend)
    return state


CALLS: dict[str, Callable[[kernels.Backend], Tensor | tuple[Tensor, ...]]] = {
    "nearest_code": lambda backend: kernels.nearest_code(x, x, backend=backend),
    "code_statistics": lambda backend: kernels.code_statistics(
        x, torch.tensor([0, 1]), 2, backend=backend
    ),
    "ema_update_": average,
    "code_log_probabilities": lambda backend: kernels.code_log_probabilities(
        x[None], x, backend=backend
    ),
}


def triton_is(monkeypatch: pytest.MonkeyPatch, installed: bool, gpu: bool) -> None:
    found = importlib.util.find_spec("torch") if installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)


def test_torch_can_always_run() -> None:
    assert kernels.reason_unavailable("torch") is None
    assert kernels.reason_unavailable("auto") is None
    assert "torch" in kernels.available_backends()


@pytest.mark.parametrize(
    ("installed", "gpu", "reason"),
    [
        (False, False, "triton is not installed (pip install 'mmvq[triton]')"),
        (False, True, "triton is not installed (pip install 'mmvq[triton]')"),
        (True, False, "torch sees no GPU"),
    ],
)
@pytest.mark.parametrize("name", CALLS)
def test_why_triton_cannot_run(
    monkeypatch: pytest.MonkeyPatch, name: str, installed: bool, gpu: bool, reason: str
) -> None:
    triton_is(monkeypatch, installed, gpu)
    assert kernels.reason_unavailable("triton") == reason
    assert kernels.available_backends() == ("torch",)
    with pytest.raises(RuntimeError) as error:
        CALLS[name]("triton")
    assert str(error.value) == (
        f"{name}: the triton backend cannot run because {reason}.\n"
        "  backend: 'triton'\n"
        '  Hint: use backend="auto".'
    )


def test_an_old_gpu_runs_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_is(monkeypatch, installed=True, gpu=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert kernels.reason_unavailable("triton") == "the GPU's compute capability is below 8.0"
    assert kernels.available_backends() == ("torch",)


@pytest.mark.parametrize("name", CALLS)
def test_triton_takes_tensors_of_the_gpu_only(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    triton_is(monkeypatch, installed=True, gpu=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert kernels.available_backends() == ("triton", "torch")
    with pytest.raises(RuntimeError, match="cannot run because a tensor is on the cpu"):
        CALLS[name]("triton")


def on(gpu: str, dtype: torch.dtype = torch.float32) -> Mock:
    return Mock(device=torch.device(gpu), dtype=dtype)


def test_auto_says_once_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for gpu, said in ((True, "auto on cuda:0: Triton kernels"), (False, "as torch sees no GPU")):
        triton_is(monkeypatch, installed=True, gpu=gpu)
        backends._GPUS.clear()
        caplog.clear()
        with caplog.at_level(logging.DEBUG, "mmvq_kernels"):
            assert not backends.runs_triton(x)
            assert not backends.runs_triton(on("cuda:0", torch.float64))
            assert not backends.runs_triton(on("cuda:0"), on("cuda:1"))
            assert not backends.runs_triton(on("cuda:0"), None, x)
            assert caplog.messages == []
            assert [backends.runs_triton(on("cuda:0"), None) for _ in range(3)] == [gpu] * 3
        (record,) = caplog.messages
        assert said in record
    backends._GPUS.clear()


@pytest.mark.parametrize("current", [0, 1])
def test_of_several_gpus_each_is_asked_for_itself(
    current: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_each = {0: (9, 0), 1: (7, 5)}
    triton_is(monkeypatch, installed=True, gpu=True)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_capability",
        lambda gpu: of_each[current if gpu is None else gpu.index],
    )
    backends._GPUS.clear()
    assert backends.runs_triton(on("cuda:0"))
    assert not backends.runs_triton(on("cuda:1"))
    backends._GPUS.clear()
    backends.require("here", "triton", None, on("cuda:0"))
    with pytest.raises(RuntimeError, match=r"compute capability is below 8\.0"):
        backends.require("here", "triton", on("cuda:1"))
    assert (kernels.reason_unavailable("triton") is None) == (current == 0)


@pytest.mark.parametrize("name", CALLS)
def test_auto_and_torch_are_the_same_here(name: str) -> None:
    for mine, other in zip(CALLS[name]("auto"), CALLS[name]("torch"), strict=True):
        assert torch.equal(mine, other)


def test_the_kernels_never_import_mmvq() -> None:
    code = (
        "import sys, mmvq_kernels, pkgutil, importlib, importlib.util\n"
        "assert 'triton' not in sys.modules\n"
        "for part in pkgutil.walk_packages(mmvq_kernels.__path__, 'mmvq_kernels.'):\n"
        "    if '.gpu' not in part.name or importlib.util.find_spec('triton'):\n"
        "        importlib.import_module(part.name)\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'mmvq']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
