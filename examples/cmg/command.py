"""Common parts of the command lines: exit codes, and types of arguments for `argparse`."""

from __future__ import annotations

import math
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable

from .errors import DataError
from .ranks import is_first


def exit_code(name: str, run: Callable[[], None], stopped: Callable[[], str]) -> int:
    """Run a command; return 0, 2 for unusable input or a missing package, or 130 if interrupted.

    Args:
        name: Name of the command.
        run: The command.
        stopped: Gives the message to print if it is interrupted. Errors have their own.
    """
    try:
        run()
        return 0
    except (DataError, OSError) as error:
        code, message = 2, str(error)
    except ImportError as error:  # of an extra
        code, message = 2, " ".join(str(error).split())
    except KeyboardInterrupt:
        code, message = 130, stopped()
    if is_first():
        print(f"{name}: {message}", file=sys.stderr)
    return code


def positive_int(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise ArgumentTypeError(f"must be at least 1; got {text}")
    return value


def natural(text: str) -> int:
    """An integer of at least 0."""
    value = int(text)
    if value < 0:
        raise ArgumentTypeError(f"must be at least 0; got {text}")
    return value


def natural_float(text: str) -> float:
    """A number of at least 0."""
    value = float(text)
    if not value >= 0:
        raise ArgumentTypeError(f"must be at least 0; got {text}")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"must be above 0, and finite; got {text}")
    return value


def seed(text: str) -> int:
    """An integer that numpy and torch both accept as a seed."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise ArgumentTypeError(f"must be 0 to 2**32 - 1; got {text}")
    return value
