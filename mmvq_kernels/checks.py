"""Checks of values, made only where they cost no wait for a device."""

from __future__ import annotations

import torch
from torch import Tensor

from mmvq_kernels.backends import transformed
from mmvq_kernels.messages import message


def readable(x: Tensor) -> bool:
    """Whether the host can read `x` as its memory: on the CPU, in no graph and no transform."""
    plain = type(x) is Tensor and x.device.type == "cpu"  # a fake tensor is of another class
    return plain and not (torch.compiler.is_compiling() or transformed())


def check_below(where: str, size: int, hint: str, **indices: Tensor) -> None:
    """Each tensor of int64 holds numbers below `size`; looked at only if `readable`.

    Raises:
        IndexError: one does not.
    """
    for name, x in indices.items():
        if readable(x) and x.numel() and (largest := int(x.numpy().max())) >= size:
            rule = f"{name} must be below {size}"
            raise IndexError(message(where, rule, hint=hint, largest=largest))
