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
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
        raise DataError(f"--output {folder}: cannot be written ({error}).") from error
