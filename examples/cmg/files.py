"""Atomic writes, and the folders that the example writes to."""

from __future__ import annotations

import os
import re
import secrets
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from .errors import DataError


def cache_folder() -> Path:
    """The folder of files that can be made again: `$MMVQ_CACHE`, by default `~/.cache/mmvq`."""
    return Path(os.environ.get("MMVQ_CACHE") or "~/.cache/mmvq").expanduser()


def write_atomic(path: str | Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a temporary file beside `path` and rename it, so that readers see a complete file.

    If several processes write the same path at the same time, the last to finish wins. A killed
    process leaves a hidden temporary file, which the next write of the same path removes (except
    on Windows and on file systems without locks).

    Args:
        path: The file to create or replace. Its folder is created if it does not exist.
        content: The bytes to write, or a function that writes them to an open file.

    Raises:
        DataError: The file cannot be written, for example because the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        while not _replace(path, content):
            pass
    except OSError as error:
        rule = "cannot be written; its previous content is unchanged"
        raise DataError(f"{path}: {rule} ({error}).") from error


def _replace(path: Path, content: bytes | Callable[[BinaryIO], object]) -> bool:
    """Write and rename; False if another process removed the temporary file as abandoned.

    That can happen before the file is locked, or between unlocking and renaming.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:
            _lock(file.fileno())
            if callable(content):
                content(file)
            else:
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
    """Remove the temporary files of earlier writes of `path` that no process has locked."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.partial")
    for partial in path.parent.iterdir():
        if ours.fullmatch(partial.name) and not partial.is_symlink():
            with suppress(OSError), partial.open("r+b") as file:
                if _lock(file.fileno()):
                    partial.unlink()


def _lock(file: int) -> bool:
    """Lock a file until it is closed; False if it is locked already, or cannot be locked."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def make_writable(folder: Path) -> None:
    """Create `folder` if needed, and check that files can be written to it.

    Raises:
        DataError: The folder cannot be created, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(f"{folder}: cannot be written into ({error}).") from error
