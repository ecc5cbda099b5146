"""Files that are either whole or absent."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .errors import DataError


def write_atomic(path: str | Path, content: bytes) -> None:
    """Write `content` beside `path` and rename, so that no reader ever sees half a file.

    Args:
        path: The file to create or replace; its folder is created if missing.
        content: Everything the file shall hold.

    Raises:
        DataError: It cannot be written: a full disk, no permission.

    A process killed half-way leaves a hidden file, which the next write takes over.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        rule = "cannot be written; what it held before is untouched"
        raise DataError(f"{path}: {rule} ({error}).") from error


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
