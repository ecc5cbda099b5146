"""Old names, which work for one more release."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from mmvq_kernels.messages import message

P = ParamSpec("P")
R = TypeVar("R")


def warn_of_old_name(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warn the caller of the function that calls this one."""
    text = f"{old} is now {new}; the next release drops the old name"
    warnings.warn(text, DeprecationWarning, stacklevel)


def renamed(module: str, name: str, **new: Callable[..., Any]) -> Callable[..., Any]:
    """What `module.__getattr__(name)` returns for the old names of functions: the new ones.

    Raises:
        AttributeError: the module never had that name.

    Warns:
        DeprecationWarning: always, with the new name.
    """
    if name not in new:
        rule, hint = f"the module has no attribute {name!r}", f"look at {module}.__all__"
        raise AttributeError(message(module, rule, hint=hint, name=name))
    warn_of_old_name(f"{module}.{name}", f"{module}.{new[name].__name__}", stacklevel=4)
    return new[name]


def renamed_arguments(**new: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the function takes its old keyword arguments too, each with a warning."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in new.keys() & kwargs.keys():
                called = function.__qualname__.removesuffix(".__init__")
                warn_of_old_name(f"{called}({name}=)", f"{called}({new[name]}=)")
                if new[name] not in kwargs:  # else the call fails, as the old name is unknown
                    kwargs[new[name]] = kwargs.pop(name)
            return function(*args, **kwargs)

        return call

    return decorate
