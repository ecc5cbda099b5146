"""The form of every error message: where and the rule, the values it got, and a hint."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Number

import torch
from torch import Tensor


class _Bare(str):
    """A string whose repr has no quotes."""

    __repr__ = str.__str__


def describe(value: object) -> object:
    """A value whose repr shows a tensor as `float32[800, 256]`, other objects by their type."""
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


def message(where: str, rule: str, /, *, hint: str, **got: object) -> str:
    """Compose `where: rule.`, the values it got, and the hint, one line each."""
    values = "   ".join(f"{name}: {describe(value)!r}" for name, value in got.items())
    return f"{where}: {rule}.\n  {values}\n  Hint: {hint}."
