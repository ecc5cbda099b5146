"""Files that are either whole or absent."""

from __future__ import annotations

import os
import re
import secrets
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from .errors import DataError


def write_atomic(path: str | Path, content: bytes) -> None:
    """Write `content` beside `path` and rename, so that no reader ever sees half a file.

    Args:
        path: The file to create or replace; its folder is created if missing.
        content: Everything the file shall hold.

    Raises:
        DataError: It cannot be written: a full disk, no permission.

    Of several processes that write one path at the same time, each writes a file of its own, and
    the last to rename wins. A process killed half-way leaves a hidden file, which the next write of
    the same path removes; not on Windows, nor where the file system has no locks.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        while not _in_place(path, content):
            pass
    except OSError as error:
        rule = "cannot be written; what it held before is untouched"
        raise DataError(f"{path}: {rule} ({error}).") from error


def _in_place(path: Path, content: bytes) -> bool:
    """Write and rename; False if another process took the file for one that was left, and is done.

    That can be before it is locked, or between the end of the lock and the new name.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:
            _hold(file.fileno())
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.replace(partial, path)
        except FileNotFoundError:
            return False
        return True
    finally:
        partial.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    """Of the files that writes of `path` made, those that no process holds any more."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.partial")
    for partial in path.parent.iterdir():
        if ours.fullmatch(partial.name) and not partial.is_symlink():
            with suppress(OSError), partial.open("r+b") as file:
                if _hold(file.fileno()):
                    partial.unlink()


def _hold(file: int) -> bool:
    """Lock a file until it is closed; False if another process holds it, or none can."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def make_writable(folder: Path) -> None:
    """Create `folder` if it is missing, and write to it once: better now than after a run.

    Raises:
        DataError: That cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(f"{folder}: cannot be written into ({error}).") from error
