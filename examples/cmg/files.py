"""Atomic writes, and the folders that the example writes to.

No link is followed at the names that are written: a temporary file is new and of the process's own,
and takes the place of a link at the final name.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
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
        _remove_abandoned(path.parent, re.escape(path.name))
        while not _replace(path, content):
            pass
    except OSError as error:
        rule = "cannot be written; its previous content is unchanged"
        raise DataError(f"{path}: {rule} ({error}).") from error


def _replace(path: Path, content: bytes | Callable[[BinaryIO], object]) -> bool:
    """Write and rename; False if another process removed the temporary file as abandoned.

    That can happen before the file is locked, or between unlocking and renaming.
    """
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with hidden.open("xb") as file:
            _lock(file.fileno())
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.replace(hidden, path)
        except FileNotFoundError:
            return False
        return True
    finally:
        hidden.unlink(missing_ok=True)


def _remove_abandoned(folder: Path, name: str = r".+") -> None:
    """Remove the temporary files of earlier writes of `name` that no process has locked."""
    ours = re.compile(rf"\.{name}\.[0-9a-f]{{16}}\.partial")
    for found in folder.iterdir():
        if ours.fullmatch(found.name):
            with suppress(OSError), open(found, "r+b", opener=_open_no_link) as file:
                if _lock(file.fileno()):
                    found.unlink()


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))


def _lock(file: int) -> bool:
    """Lock a file until it is closed; False if it is locked already, or cannot be locked."""
    try:
        _flock(file)
    except OSError:
        return False
    return True


def _flock(file: int, *, wait: bool = False) -> None:
    """Lock a file until it is closed.

    Raises:
        BlockingIOError: It is locked already, and not to be waited for.
        OSError: It cannot be locked.
    """
    if sys.platform == "win32":
        raise OSError("no locks")
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


_HELD: set[int] = set()  # descriptors of locked folders


def _unlock(file: int) -> None:
    _HELD.discard(file)
    os.close(file)


def _forget_locks() -> None:
    """Close the descriptors in a process forked from this one, which would keep the locks."""
    while _HELD:
        os.close(_HELD.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Hold a folder for this run, and remove what killed writes left in it.

    The operating system ends the hold with the process, however that ends. On Windows and on file
    systems without locks for folders, nothing is held or refused.

    Raises:
        DataError: Another run holds the folder.
    """
    with ExitStack() as held:
        try:
            file = os.open(folder, os.O_RDONLY)
            _HELD.add(file)
            held.callback(_unlock, file)
            _flock(file)
            _remove_abandoned(folder)
        except BlockingIOError as error:
            rule = "in use by another run. Hint: wait for it, or choose another folder"
            raise DataError(f"{folder}: {rule}.") from error
        except OSError:  # no locks here
            pass
        yield


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is in this context of the folder, which is created if needed.

    On Windows and on file systems without locks, it does not wait.

    Raises:
        DataError: The folder cannot be created, or not be written to.
    """
    make_writable(folder)
    file = os.open(folder, os.O_RDONLY) if sys.platform != "win32" else None
    try:
        if file is not None:
            _HELD.add(file)
            with suppress(OSError):
                _flock(file, wait=True)
        yield
    finally:
        if file is not None:
            _unlock(file)


def temporary_folder(parent: Path, kind: str) -> tuple[Path, Callable[[], None]]:
    """A new folder, and a function that removes it.

    Folders of this kind that killed processes left are removed (where there are locks). A process
    that was forked from this one cannot remove the folder.

    Raises:
        DataError: The parent cannot be created, or not be written to.
    """
    make_writable(parent)
    path = parent / f".{kind}.{secrets.token_hex(8)}.partial"
    if sys.platform == "win32":
        path.mkdir()
        return path, partial(shutil.rmtree, path, ignore_errors=True)
    ours = re.compile(rf"\.{re.escape(kind)}\.[0-9a-f]{{16}}\.partial")
    for old in filter(lambda x: ours.fullmatch(x.name), parent.iterdir()):
        with suppress(OSError):
            file = os.open(old, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            if _lock(file):
                shutil.rmtree(old, ignore_errors=True)
            os.close(file)
    path.mkdir()
    file, process = os.open(path, os.O_RDONLY), os.getpid()
    _HELD.add(file)
    _lock(file)

    def remove() -> None:
        if os.getpid() == process:
            shutil.rmtree(path, ignore_errors=True)
            _unlock(file)

    return path, remove


def require_new(folder: str | Path) -> Path:
    """The absolute path of a folder that does not exist or is empty.

    Raises:
        DataError: It is something else.
    """
    folder = Path(os.path.abspath(folder))
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        hint = "choose another folder, or remove it"
        raise DataError(f"{folder}: exists and is not empty. Hint: {hint}.")
    return folder


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Give a temporary folder to write into, which takes the name `folder` when all is written.

    If the writing fails, nothing is left. An empty folder is replaced.

    Raises:
        DataError: `folder` exists and is not empty, or cannot be written.
    """
    folder = require_new(folder)
    partial, remove = temporary_folder(folder.parent, folder.name)
    try:
        yield partial
        if folder.is_dir():
            folder.rmdir()  # it is empty
        partial.rename(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error}).") from error
    finally:
        remove()


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
