"""Settings: attributes that a user may read and set at any time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Self, TypeVar, cast, overload

from torch import nn

T = TypeVar("T")


class Setting(Generic[T]):
    """An attribute of a module that is checked whenever it is set.

    Settings are arguments of `__init__`. `save_pretrained` writes them to config.json, and they are
    not part of `state_dict`. A compiled module reads them at each call. A schedule of a float
    recompiles at most once.

    Args:
        check: function called with the class name and `name=value`, which raises for wrong values.
        part: name of the submodule that has the setting, under the same name, and checks it.

    Examples:
        >>> book = EMACodebook(2, 4)
        >>> book.decay = 2.0
        Traceback (most recent call last):
        ...
        ValueError: EMACodebook: decay must be a finite number from 0 to 1.
          decay: 2.0
          Hint: pass a number from 0 to 1.
    """

    check: Callable[..., None] | None
    part: str | None
    name: str
    kept: str  # attribute of the value; with `name` itself, dynamo of torch 2.11 loops

    def __init__(
        self, check: Callable[..., None] | None = None, *, part: str | None = None
    ) -> None:
        self.check, self.part = check, part

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.kept = name, f"_{name}"

    @overload
    def __get__(self, module: None, owner: type) -> Self: ...
    @overload
    def __get__(self, module: nn.Module, owner: type) -> T: ...
    def __get__(self, module: nn.Module | None, owner: type) -> Self | T:
        if module is None:
            return self
        if self.part is not None:
            value: T = getattr(getattr(module, self.part), self.name)
        elif self.name in module._modules:  # where nn.Module stores submodules
            value = cast(T, module._modules[self.name])
        else:
            value = getattr(module, self.kept)
        return value

    def __set__(self, module: nn.Module, value: T) -> None:
        if self.part is not None:
            setattr(getattr(module, self.part), self.name, value)
            return
        if self.check is not None:
            self.check(type(module).__name__, **{self.name: value})
        module.__dict__[self.kept] = value
