"""The one form of every error message: where and the rule; what came; what to do."""

from __future__ import annotations

from torch import Tensor


def describe(value: object) -> str:
    """Tensors as `float32[800, 256]`, a type by its name, anything else by its repr."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return value.__name__ if isinstance(value, type) else repr(value)


def message(where: str, rule: str, *, hint: str, **came: object) -> str:
    """Compose `where: rule.`, the values that came, and the hint, one line each."""
    values = "   ".join(f"{name}: {describe(value)}" for name, value in came.items())
    return f"{where}: {rule}.\n  {values}\n  Hint: {hint}."
