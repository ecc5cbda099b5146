"""The one form of every error message: where and the rule; what came; what to do."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Number

import torch
from torch import Tensor


class _Bare(str):
    """Text that stands without quotes in the repr of what holds it."""

    __repr__ = str.__str__


def describe(value: object) -> object:
    """What shows, by its repr, a tensor as `float32[800, 256]` and any other object by its type."""
    match value:
        case Tensor():
            place = "" if value.device.type == "cpu" else f" on {value.device}"
            return _Bare(f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{place}")
        case None | str() | Number():
            return value
        case torch.device():
            return str(value)
        case Mapping():
            return {key: describe(each) for key, each in value.items()}
        case list():
            return [describe(each) for each in value]
        case tuple():
            return tuple(describe(each) for each in value)
    return _Bare((value if isinstance(value, type) else type(value)).__name__)


def message(where: str, rule: str, /, *, hint: str, **came: object) -> str:
    """Compose `where: rule.`, the values that came, and the hint, one line each."""
    values = "   ".join(f"{name}: {describe(value)!r}" for name, value in came.items())
    return f"{where}: {rule}.\n  {values}\n  Hint: {hint}."
