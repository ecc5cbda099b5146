"""Optional dependencies: a package that is missing is named, with the way to install it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmvq.checks import message


@contextmanager
def optional_import(where: str, rule: str, hint: str) -> Iterator[None]:
    """Import optional packages inside.

    Raises:
        ImportError: one of them is missing; the message says what needs it and how to install it.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(message(where, rule, hint=hint, missing=error.name)) from error
