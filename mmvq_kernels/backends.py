"""Which implementation runs: `auto`, `torch` or `triton`."""

from __future__ import annotations

import importlib.util
from typing import Literal, get_args

import torch

from mmvq_kernels.messages import message

Backend = Literal["auto", "torch", "triton"]


def reason_unavailable(backend: str) -> str | None:
    """Why `backend` cannot run here, or None when it can.

    Raises:
        ValueError: the name is not a backend.
    """
    _check("reason_unavailable", backend)
    if backend != "triton":
        return None
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'mmvq[triton]')"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return "this version of mmvq_kernels ships the torch path only"


def available_backends() -> tuple[str, ...]:
    """The backends that can run on this machine, fastest first."""
    return tuple(name for name in ("triton", "torch") if reason_unavailable(name) is None)


def require(where: str, backend: str) -> None:
    """Raise unless `backend` can run here, in the name of `where`.

    Raises:
        ValueError: the name is not a backend.
        RuntimeError: it is one, but cannot run; the message says why.
    """
    _check(where, backend)
    reason = reason_unavailable(backend)
    if reason is not None:
        raise RuntimeError(
            message(
                where,
                f"the {backend} backend cannot run because {reason}",
                hint='use backend="auto"',
                backend=backend,
            )
        )


def _check(where: str, backend: str) -> None:
    if backend not in get_args(Backend):
        raise ValueError(
            message(
                where,
                f"backend must be one of {', '.join(map(repr, get_args(Backend)))}",
                hint='use backend="auto" to let the library choose',
                backend=backend,
            )
        )
