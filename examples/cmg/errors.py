"""The error that unusable input raises, everywhere in the example."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class DataError(ValueError):
    """Unusable input. The message is one line: where, the rule, the value it got, and a hint."""


@contextmanager
def optional_import(where: str, hint: str) -> Iterator[None]:
    """Import optional packages inside.

    Args:
        where: What needs them.
        hint: How to install them.

    Raises:
        DataError: One of them is missing.
    """
    try:
        yield
    except ImportError as error:
        package = error.name or error
        raise DataError(f"{where}: {package} is not installed. Hint: {hint}") from error
