"""The arrays of a data set: the members of an npz file, or the .npy files of a folder.

Both give the type and shape of an array without reading it, and compare them with the size of the
file before anything is allocated. Nothing is unpickled.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Sequence
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .errors import DataError

CLIPS_AT_ONCE = 32  # when a data set is read from end to end
Array = np.ndarray[Any, np.dtype[Any]]
_LARGEST = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1100}  # bytes from a byte of the file
_MOST_DIMENSIONS = 32


class Rows(Protocol):
    """Features [N, T, ..., C] of all clips: a tensor, or an array that is read when indexed."""

    @property
    def shape(self) -> Sequence[int]:
        """N, T, ..., C."""

    def __getitem__(self, rows: Tensor) -> Tensor:
        """The features of the clips with these indices."""


class Arrays(Protocol):
    """Arrays by name.

    Attributes:
        path: File or folder.
        names: Names of the arrays.
    """

    path: Path
    names: tuple[str, ...]

    def header(self, name: str) -> Header:
        """Type and shape of an array, which is not read."""

    def read(self, name: str) -> Array:
        """The array. Object arrays are refused."""

    def features(self, name: str) -> Rows:
        """The array as features, in memory or read when indexed."""

    def where(self, name: str) -> str:
        """The array, for messages."""


class Header(NamedTuple):
    """Type and shape of an array."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class MappedArray:
    """An .npy file as `Rows`. It is mapped into memory only while rows are read.

    Args:
        path: The file.

    Raises:
        DataError: The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        array = self._map()
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Read rows: float32, or float16 where the file holds float16.

        Raises:
            DataError: The file has changed.
        """
        array = self._map()
        if (array.shape, array.dtype) != (self.shape, self.dtype):
            raise DataError(f"{self.path}: has changed since it was opened.")
        return to_tensor(np.asarray(array[rows.numpy()]))

    def _map(self) -> Array:
        try:
            return np.load(self.path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy raises many types for damaged files
            raise _unreadable(str(self.path), error) from error


class NpzFile:
    """An npz file.

    Raises:
        DataError: There is no such file, or it is not a zip.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except FileNotFoundError:
            raise DataError(f"{path}: no such file. Hint: see --data in --help.") from None
        except PermissionError as error:
            raise DataError(f"{path}: cannot be read ({error}).") from error
        except Exception as error:  # zipfile raises many types for damaged files
            rule = "not an npz file, or cut short"
            raise DataError(f"{path}: {rule}. Hint: write it with numpy.savez.") from error
        self.members = {x.filename.removesuffix(".npy"): x for x in members}
        if len(self.members) < len(members):
            raise DataError(f"{path}: two arrays have the same name.")
        self.names = tuple(self.members)

    def header(self, name: str) -> Header:
        """Type and shape of an array."""
        return self._open(name, lambda file, header: header)

    def read(self, name: str) -> Array:
        """The array. Object arrays are refused."""

        def load(file: IO[bytes], header: Header) -> Array:
            member = self.members[name]
            if header.dtype.hasobject:
                raise ValueError("Object arrays are not read")
            size = header.dtype.itemsize * prod(header.shape)
            ratio = _LARGEST.get(member.compress_type, 0)  # numpy writes no other type
            if size > min(member.file_size, ratio * member.compress_size):
                raise ValueError(f"{header} is larger than the file")
            with zipfile.ZipFile(self.path) as archive, archive.open(member) as whole:
                return np.lib.format.read_array(whole, allow_pickle=False)

        return self._open(name, load)

    def features(self, name: str) -> Tensor:
        """Features in memory."""
        return to_tensor(self.read(name))

    def where(self, name: str) -> str:
        """The array, for messages."""
        return f"{self.path}: {name}"

    def _open(self, name: str, use: Callable[[IO[bytes], Header], Any]) -> Any:
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.members[name]) as file:
                return use(file, _header(file))
        except Exception as error:  # zipfile and numpy raise many types for damaged bytes
            raise _unreadable(self.where(name), error) from error


class Folder:
    """A folder of .npy files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        files = (x for x in path.glob("[!.]*.npy") if x.is_file())
        self.names = tuple(sorted(x.name.removesuffix(".npy") for x in files))

    def header(self, name: str) -> Header:
        """Type and shape of an array."""
        try:
            with self._file(name).open("rb") as file:
                return _header(file)
        except Exception as error:  # numpy raises many types for damaged files
            raise _unreadable(self.where(name), error) from error

    def read(self, name: str) -> Array:
        """The array. Object arrays are refused."""
        header = self.header(name)
        try:
            if header.dtype.hasobject:
                raise ValueError("Object arrays are not read")
            size = header.dtype.itemsize * prod(header.shape)
            if size > self._file(name).stat().st_size:
                raise ValueError(f"{header} is larger than the file")
            return np.load(self._file(name), allow_pickle=False)
        except Exception as error:  # numpy raises many types for damaged files
            raise _unreadable(self.where(name), error) from error

    def features(self, name: str) -> MappedArray:
        """Features that are read when indexed."""
        return MappedArray(self._file(name))

    def where(self, name: str) -> str:
        """The array, for messages."""
        return str(self._file(name))

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.npy"


def to_tensor(array: Array) -> Tensor:
    """A tensor of features: float16 stays; other types become float32, Inf where they overflow."""
    with np.errstate(over="ignore"):
        array = array.astype("=f2" if array.dtype.itemsize == 2 else "=f4", copy=False)
    return torch.from_numpy(np.require(array, requirements="CW"))


def write_features(
    file: IO[bytes], shape: Sequence[int], parts: Iterable[Tensor], title: str
) -> None:
    """Write an .npy file of float16 features [N, T, ..., C], a few clips at a time.

    Args:
        file: The open file.
        shape: N, T, ..., C.
        parts: float16 [n, T, ..., C], together N clips.
        title: Title of the progress bar.
    """
    header: Any = {"descr": "<f2", "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(file, header)
    with tqdm(desc=title, total=shape[0], unit="clip", disable=None) as bar:
        for part in parts:
            file.write(part.contiguous().numpy().astype("<f2", copy=False).tobytes())
            bar.update(len(part))


def _header(file: IO[bytes]) -> Header:
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"version {version} of the npy format")
    shape, _, dtype = read(file)
    if len(shape) > _MOST_DIMENSIONS or any(n < 0 for n in shape):
        raise ValueError(f"impossible shape {shape}")
    return Header(dtype, shape)


def _unreadable(where: str, error: Exception) -> DataError:
    hint = " Hint: pad clips to one T." if "Object arrays" in str(error) else ""
    text = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{where}: cannot be read ({text:.300}).{hint}")
