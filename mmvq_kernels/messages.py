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


def message(
    where: str, rule: str, values: Mapping[str, object] = {}, /, *, hint: str, **got: object
) -> str:
    """Compose `where: rule.`, the values it got, and the hint, one line each.

    Values whose names a user chose are passed as a mapping: one may be called `hint`.
    """
    listed = "   ".join(f"{name}: {describe(x)!r}" for name, x in {**values, **got}.items())
    return f"{where}: {rule}.\n  {listed}\n  Hint: {hint}."
