"""What a CUDA graph can hold: on the way to a launch nothing looks at data or leaves the GPU.

Tensors without data raise where one would wait for the GPU (`.item()`, `bool(x)`, `nonzero`, a
shape that depends on data): fake CUDA tensors for the operations, tensors of the meta device for a
whole training step, as autograd has no fake CUDA.
"""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from kernels.audit import workloads
from kernels.audit.workloads import fake
from support import bools
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmvq
from mmvq_kernels import operators

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


class StaysThere(TorchDispatchMode):
    """Raises when data crosses between devices; numbers of no dimension may come from the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []  # ours, in the order of their calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if len({x.device.type for x in tensors if x.ndim}) > 1:
            raise RuntimeError(f"{func} crosses between devices")
        if func.namespace == "mmvq":
            self.operators.append(func._opname)
        return out


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_an_operation_never_waits(name: str) -> None:
    def work() -> None:
        with StaysThere():
            workloads.WORKLOADS[name]()

    assert workloads.record(work)


@pytest.mark.parametrize("operation", ["search", "statistics"])
def test_an_empty_batch_never_waits(operation: str) -> None:
    launches = workloads.record(lambda: getattr(workloads, operation)(0, 5, 4))
    names = [launch.kernel.__name__ for launch in launches]
    assert names == (["prepare_kernel"] if operation == "search" else [])


WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "unique": lambda x: x.unique(),
    "to the CPU": lambda x: x.cpu(),
    "from the CPU": lambda x: x.copy_(torch.ones(3)),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_would_wait_is_caught(name: str) -> None:
    with pytest.raises(RuntimeError), StaysThere():
        WAITS[name](torch.empty(3, device="meta"))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("partner", ["attention", "aligned", "none"])
def test_a_training_step_never_waits(
    masked: bool, partner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the operators, which are called as on a GPU; the tests above look into them."""
    monkeypatch.setattr(operators, "through_operator", lambda *_: True)
    monkeypatch.setattr("mmvq_kernels.distribution.through_operator", lambda *_: True)
    monkeypatch.setattr(operators, "runs_triton", lambda *_: True)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no meta device
    quantizer = mmvq.MultiModalEMAQuantizer(
        16, 32, init="uniform", reset_after=1, partner=partner
    ).to("meta")
    z = {m: torch.empty(3, 10, 16, device="meta", requires_grad=True) for m in ("audio", "video")}
    masks = {"audio": bools(3, 10).to("meta")} if masked else None
    with StaysThere() as mode:
        quantizer(z, masks).loss.backward()
        mmvq.CrossModalCodeMatchingLoss()(z, quantizer.codebook, masks).backward()
    assert mode.operators == [
        "mix",
        "quantize",
        "code_statistics",
        "update_codebook_",
        "quantize_backward",
        "code_log_probabilities",
        "code_log_probabilities_backward",
    ]


LOSSES: dict[str, tuple[Any, Any]] = {
    "commitment": (
        mmvq.CrossModalCommitmentLoss,
        lambda loss, z, masks: loss(z, {m: x.detach() for m, x in z.items()}, masks),
    ),
    "cpc": (
        lambda: mmvq.CrossCPC(16),
        lambda cpc, z, masks: cpc(z, masks, start="all").loss,
    ),
    "club": (
        lambda: mmvq.CLUBEstimator(16, 16, 8),
        lambda club, z, masks: club(*z.values(), masks and masks["audio"]),
    ),
    "club's penalty": (
        lambda: mmvq.CLUBEstimator(16, 16, 8),
        lambda club, z, masks: club.penalty(*z.values(), masks and masks["audio"]),
    ),
    "club, to learn": (
        lambda: mmvq.CLUBEstimator(16, 16, 8),
        lambda club, z, masks: club.learning_loss(*z.values(), masks and masks["audio"]),
    ),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_never_waits(name: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code matching is part of the training step above."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no meta device
    build, loss = LOSSES[name]
    module = build().to("meta")
    z = {m: torch.empty(3, 10, 16, device="meta", requires_grad=True) for m in ("audio", "video")}
    masks = {"audio": bools(3, 10).to("meta")} if masked else None
    with StaysThere():
        loss(module, z, masks).backward()


@pytest.mark.parametrize("D", [5, 16, 257])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_kernels_return_what_the_operators_promise(D: int, dtype: torch.dtype) -> None:
    """Shapes, dtypes and strides, on which a compiled graph relies."""
    from mmvq_kernels.gpu import commitment, distribution, mixing, nearest, statistics

    ops = torch.ops.mmvq
    pairs: list[tuple[Tensor, Tensor]] = []

    def promised(mine: Any, theirs: Any) -> None:
        pairs.extend(zip(tree_leaves(mine), tree_leaves(theirs), strict=True))

    def work() -> None:
        x, codes = fake(30, D, dtype=dtype), fake(9, D)
        chosen, groups = fake(30, dtype=torch.int64), fake(30, dtype=torch.int64)
        promised(nearest.search(x, codes), ops.nearest_code(x, codes, False))
        for valid in (None, fake(30, dtype=torch.bool)):
            args = x, valid, 3, [0, 2], "attention", 0.5, None
            promised(mixing.mix(*args), ops.mix(*args))
            args = x, codes, valid, 2, 0.25, 0.1, True
            out = commitment.forward(*args)
            promised(out, ops.quantize(*args))
            args = x, out[1], valid, out[4], out[0], out[3], True
            promised(commitment.backward(*args), ops.quantize_backward(*args))
        for deterministic in (True, False):
            args = x, chosen, 9, groups, 2, deterministic
            promised(statistics.accumulate(*args), ops.code_statistics(*args))
        clips, used = x.view(30, 1, D), fake(30, 1, dtype=torch.bool)
        out = distribution.forward(clips, codes, used)
        promised(out, ops.code_log_probabilities(clips, codes, used))
        for of_codes in (True, False):
            args = fake(30, 9), clips, codes, used, *out, of_codes
            theirs = ops.code_log_probabilities_backward(*args)
            promised(distribution.backward(*args), theirs)

    assert workloads.record(work)
    for mine, theirs in pairs:
        assert mine.shape == theirs.shape
        assert mine.stride() == theirs.stride()
        assert mine.dtype == theirs.dtype
        assert mine.device == theirs.device
