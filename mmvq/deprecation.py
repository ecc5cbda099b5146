"""Old names, which work for one more release."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any


def renamed(module: str, name: str, **new: Callable[..., Any]) -> Callable[..., Any]:
    """What `module.__getattr__(name)` returns for the old names of functions: the new ones.

    Raises:
        AttributeError: the module never had that name.

    Warns:
        DeprecationWarning: always, with the new name.
    """
    if name not in new:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    text = f"{module}.{name} is now {module}.{new[name].__name__}; the next release drops {name}"
    warnings.warn(text, DeprecationWarning, stacklevel=3)
    return new[name]
