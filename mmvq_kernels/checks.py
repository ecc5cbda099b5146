"""Checks of values, made only where they do not synchronise with a device."""

from __future__ import annotations

import torch
from torch import Tensor

from mmvq_kernels.backends import transformed
from mmvq_kernels.messages import message


def is_cpu_readable(x: Tensor) -> bool:
    """Whether the host can read `x`: on a CPU, outside of graphs, traces and transforms."""
    plain = type(x) is Tensor and x.device.type == "cpu"  # a fake tensor is of another class
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return plain and not (traced or transformed())


def check_below(
    where: str, size: int, hint: str, *, signed: bool = True, **indices: Tensor
) -> None:
    """Check that int64 tensors hold numbers below `size`, and none below 0 unless `signed`.

    Only tensors that are `is_cpu_readable` are checked.

    Raises:
        IndexError: a number is out of range.
    """
    for name, x in indices.items():
        if not is_cpu_readable(x) or x.numel() == 0:
            continue
        if (largest := int(x.numpy().max())) >= size:
            rule = f"{name} must be below {size}"
            raise IndexError(message(where, rule, hint=hint, largest=largest))
        if not signed and (least := int(x.numpy().min())) < 0:
            raise IndexError(message(where, f"{name} must be 0 or more", hint=hint, least=least))
