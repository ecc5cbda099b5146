"""A whole training step on the Triton kernels: how many launches, and the same state as in torch.

ATOL: codes below 2 after two steps; a dozen roundings in each, on sums of 2 * 30 vectors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import close, rounding, uniform
from torch import Tensor

from mmvq import MultiModalEMAQuantizer
from mmvq_kernels import operators
from mmvq_kernels.gpu import launching

D, L = 8, 12


@pytest.fixture
def launches(device: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched; without a GPU the operators take the CPU for one."""
    names: list[str] = []
    launch = launching.launch

    def count(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        names.append(kernel.fn.__name__)
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(launching, "launch", count)
    if device == "cpu":
        monkeypatch.setattr(operators, "through_operator", lambda *_: True)
        monkeypatch.setattr(operators, "runs_triton", lambda *_: True)
    return names


def quantizer(device: str = "cpu") -> MultiModalEMAQuantizer:
    torch.manual_seed(0)
    return MultiModalEMAQuantizer(D, L, init="uniform", reset_after=1).to(device)


def features(device: str = "cpu") -> dict[str, Tensor]:
    both = {"audio": 1, "video": 2}
    return {name: uniform(3, 10, D, seed=i).float().to(device) for name, i in both.items()}


def test_the_launches_of_a_training_step(launches: list[str], device: str) -> None:
    mine = quantizer(device)
    quantize = ["prepare_kernel", "search_kernel", "commit_kernel"]
    for _ in range(2):  # the second resets
        launches.clear()
        z = {name: x.requires_grad_() for name, x in features(device).items()}
        _, indices, loss = mine(z)
        update = ["gather_kernel", "survey_kernel", "average_kernel"]
        assert launches == ["mix_kernel", *quantize, *update]
        launches.clear()
        loss.backward()
        assert launches == ["commit_backward_kernel"]
    launches.clear()
    mine.eval()(features(device))
    assert launches == quantize
    assert indices["audio"].device.type == device


def test_the_state_is_that_of_the_torch_path(device: str, request: pytest.FixtureRequest) -> None:
    theirs = quantizer()
    expected = [theirs(features()) for _ in range(2)]
    request.getfixturevalue("launches")
    mine = quantizer(device)
    found = [mine(features(device)) for _ in range(2)]
    for a, b in zip(found, expected, strict=True):
        for name in ("audio", "video"):
            assert torch.equal(a.indices[name].cpu(), b.indices[name])
    for name, buffer in theirs.ema_codebook.named_buffers():
        close(mine.ema_codebook.get_buffer(name).cpu(), buffer, rounding(torch.float32, 2 * 12, 60))
