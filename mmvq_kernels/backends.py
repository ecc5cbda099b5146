"""Which implementation runs: `auto`, `torch` or `triton`.

`auto` takes the Triton kernels for tensors of up to float32 on a GPU that supports them, and the
torch path otherwise.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Literal, get_args

import torch
from torch import Tensor

from mmvq_kernels.messages import message

Backend = Literal["auto", "torch", "triton"]
"""The implementation: `"auto"` takes Triton where it can run, and torch otherwise."""

_BACKENDS = get_args(Backend)  # dynamo of older torch cannot trace the call

_OLDEST = (8, 0)  # compute capability with tf32 and bfloat16 matrix instructions
_logger = logging.getLogger(__name__)


def reason_unavailable(backend: str) -> str | None:
    """Why `backend` cannot run here (of several GPUs: on the current one), or None when it can.

    Raises:
        ValueError: the name is not a backend.

    Examples:
        >>> reason_unavailable("torch") is None
        True
    """
    _check("reason_unavailable", backend)
    return _reason_on(None) if backend == "triton" else None


def available_backends() -> tuple[str, ...]:
    """The backends that can run on this machine, fastest first.

    Examples:
        >>> available_backends()[-1]
        'torch'
    """
    return tuple(name for name in ("triton", "torch") if reason_unavailable(name) is None)


def require(where: str, backend: str, *tensors: Tensor | None) -> None:
    """Raise unless `backend` can run on `tensors`, in the name of `where`.

    Raises:
        ValueError: the name is not a backend.
        RuntimeError: the backend cannot run, or `torch.jit.trace` is at work.
    """
    _check(where, backend)
    refuse_tracing(where)
    if backend != "triton":
        return
    given = [x for x in tensors if x is not None]
    gpu = next((x.device for x in given if x.device.type == "cuda"), None)
    reason = _reason_on(gpu) or _reason_against(given)
    if reason is not None:
        rule = f"the {backend} backend cannot run because {reason}"
        hint = 'use backend="auto"'
        raise RuntimeError(message(where, rule, hint=hint, backend=backend))


def refuse_tracing(where: str) -> None:
    """Raise under `torch.jit.trace`, which would record the choices made for one input.

    Raises:
        RuntimeError: it is at work.
    """
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        rule = "torch.jit.trace, and torch.onnx.export(dynamo=False), cannot record it"
        hint = "use torch.export.export, or for ONNX mmvq.onnx.export(quantizer, path)"
        raise RuntimeError(message(where, rule, hint=hint, tracing=True))


def transformed() -> bool:
    """Whether a transform of `torch.func` is active, so that a tensor may be a batch of them."""
    return torch._C._are_functorch_transforms_active()


def runs_triton(*tensors: Tensor | None) -> bool:
    """Whether an operation on these tensors goes to its Triton kernels."""
    given = [x for x in tensors if x is not None]
    return _reason_against(given) is None and _gpu_runs_triton(given[0].device)


def _gpu_runs_triton(gpu: torch.device) -> bool:
    if gpu not in _GPUS:
        reason = _reason_on(gpu)
        taken = "Triton kernels" if reason is None else f"torch path, as {reason}"
        _logger.debug("auto on %s: %s", gpu, taken)
        _GPUS[gpu] = reason is None
    return _GPUS[gpu]


_GPUS: dict[torch.device, bool] = {}
_gpu_runs_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]  # it cannot trace it


def _reason_on(gpu: torch.device | None) -> str | None:
    """Why Triton cannot run on a GPU, None standing for the current one."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'mmvq[triton]')"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability(gpu) < _OLDEST:
        return "the GPU's compute capability is below 8.0"
    return None


def _reason_against(tensors: list[Tensor]) -> str | None:
    """Why the kernels cannot take these tensors; a pointer to another GPU would raise no error."""
    for x in tensors:
        if x.device.type != "cuda":
            return f"a tensor is on the {x.device.type}"
        if x.dtype == torch.float64:
            return "its kernels compute in float32 and a tensor is float64"
    if len({x.device for x in tensors}) > 1:
        return "the tensors are on several GPUs"
    return None


def _check(where: str, backend: str) -> None:
    if backend not in _BACKENDS:
        rule = f"backend must be one of {', '.join(map(repr, _BACKENDS))}"
        hint = 'use backend="auto" to let the library choose'
        raise ValueError(message(where, rule, hint=hint, backend=backend))
