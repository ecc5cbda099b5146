"""Read arrays from files that are not trusted: zips with one pickle, and HDF5."""

from __future__ import annotations

import codecs
import io
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, optional_import

Array = np.ndarray[Any, np.dtype[Any]]
_LARGEST = 2**26  # maximum bytes of a clip's pickle; the largest released one has 1 MB
_LONGEST = 256  # maximum opcodes of an array's pickle; numpy writes up to 69, and 2 for each axis
_DEFLATE = 1032  # bytes that a byte of deflate can stand for, at most
_NUMBER = re.compile(r"[fiub]\d{1,2}")
_NAMES = {  # in the pickle of an array, "numpy.core" also as "numpy._core"
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.numeric._frombuffer",
    "_codecs.encode",
}
_OPCODES = {op.code.encode("latin1"): op for op in pickletools.opcodes}
_VALUES = {  # opcodes that push their argument
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"),
    *("SHORT_BINSTRING", "BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class _Name:
    """A name that a pickle asks for. It is never imported."""

    text: str


@dataclass
class _Call:
    """A call that a pickle asks for. It is never made."""

    name: object
    arguments: object
    state: object = None


def unpickle_array(file: BinaryIO) -> Array:
    """Read the array of numbers in a pickle of any protocol, of Python 2 too.

    This is no unpickler: it knows the opcodes and the names that numpy writes for an array, keeps
    calls as descriptions, and compares the size of the one array with the bytes it was given.

    Raises:
        pickle.UnpicklingError: The pickle has other content, or is damaged.
    """
    try:
        return _array(_parse(file))
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise pickle.UnpicklingError(f"damaged: {type(error).__name__}") from error


def _parse(file: BinaryIO) -> object:
    """The object of a pickle, with names and calls as descriptions."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    for _ in range(_LONGEST):
        op = _OPCODES[file.read(1)]
        if op.name == "STRING":  # of Python 2; the reader of pickletools takes ASCII only
            stack.append(codecs.escape_decode(file.readline().strip()[1:-1])[0])
            continue
        argument: Any = op.arg.reader(file) if op.arg else None
        match op.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                (found,) = stack
                return found
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                start = marks.pop()
                stack[start:] = [tuple(stack[start:])]
            case "GLOBAL":
                stack.append(_name(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                stack[-2:] = [_name(f"{stack[-2]}.{stack[-1]}")]
            case "REDUCE":
                stack[-2:] = [_Call(*stack[-2:])]
            case "BUILD":
                state = stack.pop()
                if not isinstance(stack[-1], _Call):
                    raise pickle.UnpicklingError("it changes something else than an array")
                stack[-1].state = state
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case name if name in _VALUES:
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case name if name in _TUPLES:
                start = len(stack) - _TUPLES[name]
                stack[start:] = [tuple(stack[start:])]
            case name:
                raise pickle.UnpicklingError(f"the pickle of an array has no {name}")
    raise pickle.UnpicklingError(f"the pickle of an array has at most {_LONGEST} opcodes")


def _name(text: str) -> _Name:
    known = text.replace("numpy._core.", "numpy.core.", 1)
    if known not in _NAMES:
        raise pickle.UnpicklingError(f"it asks for {text[:60]!r}")
    return _Name(known)


def _array(found: object) -> Array:
    """The array that a parsed pickle describes."""
    match found:
        case _Call(
            _Name("numpy.core.multiarray._reconstruct"),
            (_Name("numpy.ndarray"), _, _),
            (_, tuple(shape), dtype, bool(fortran), raw),
        ):
            pass
        case _Call(
            _Name("numpy.core.numeric._frombuffer"), (raw, dtype, tuple(shape), "C" | "F" as order)
        ):
            fortran = order == "F"
        case _:
            raise pickle.UnpicklingError("it has no array")
    kind, content = _dtype(dtype), _bytes(raw)
    if not all(type(n) is int and n >= 0 for n in shape):
        raise pickle.UnpicklingError("its shape is not one")
    if math.prod(shape) * kind.itemsize != len(content):
        raise pickle.UnpicklingError(f"its shape does not fit its {len(content)} bytes")
    array: Array = np.ndarray(shape, kind, content, order="F" if fortran else "C")
    return array.astype(kind.newbyteorder("="))


def _dtype(found: object) -> np.dtype[Any]:
    match found:
        case _Call(
            _Name("numpy.dtype"),
            (str() | bytes() as code, *_),
            (_, str() | bytes() as order, None, None, None, *_),
        ):
            code, order = _text(code), _text(order)
            if _NUMBER.fullmatch(code) and order in {"<", ">", "=", "|"}:
                return np.dtype(order.replace("|", "=") + code)
    raise pickle.UnpicklingError("it has no numbers")


def _text(x: str | bytes) -> str:
    return x.decode("latin1") if isinstance(x, bytes) else x


def _bytes(raw: object) -> bytes | bytearray:
    """Bytes, which protocols 0 to 2 write as text."""
    match raw:
        case bytes() | bytearray():
            return raw
        case str(text) | _Call(_Name("_codecs.encode"), (str(text), "latin1"), None):
            return text.encode("latin1")
    raise pickle.UnpicklingError("it has no bytes")


def read_zip(path: Path) -> Array:
    """Read the array of a zip with one .pkl file.

    Raises:
        DataError: The file is missing, damaged, or has other content.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (member,) = (x for x in archive.infolist() if x.filename.endswith(".pkl"))
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise pickle.UnpicklingError("it must be stored or deflated")
            if member.file_size > min(_LARGEST, _DEFLATE * path.stat().st_size):
                raise pickle.UnpicklingError(f"{member.file_size} bytes are too many")
            with archive.open(member) as file:
                content = file.read()  # stops at file_size, and checks the checksum
        return unpickle_array(io.BytesIO(content))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, but it is in the list of clips.") from None
    except zipfile.BadZipFile as error:
        raise DataError(f"{path}: not a zip, or cut short ({error}).") from error
    except Exception as error:  # zipfile raises many types for damaged bytes
        raise DataError(f"{path}: must be a zip of one pickled numpy array ({error}).") from error


@dataclass(frozen=True)
class H5Array:
    """An array of an HDF5 file, read when indexed."""

    path: Path
    dataset: Any

    def __getitem__(self, index: Any) -> Array:
        """Read a part.

        Raises:
            DataError: The part is not there, or damaged.
        """
        try:
            return np.asarray(self.dataset[index])
        except Exception as error:  # h5py raises many types
            raise DataError(f"{self.path}: [{index}] cannot be read ({error}).") from error


def read_h5(path: Path, key: str) -> H5Array:
    """Open an array of numbers that stands in an HDF5 file itself.

    Links to other places, virtual datasets and external storage are refused, since they read other
    files. So is an array that is larger than what is stored of it can hold (a byte of deflate
    stands for up to 1,032).

    Raises:
        DataError: The file or the key is missing, or h5py is not installed.
    """
    with optional_import(str(path), "pip install h5py"):
        import h5py
    try:
        file = h5py.File(path, "r")
        names = ", ".join(map(ascii, file)) or "none"
        link = file.get(key, getlink=True)
        found = file[key] if isinstance(link, h5py.HardLink) else None
        if not isinstance(found, h5py.Dataset):
            what = "none" if link is None else type(found or link).__name__
            raise DataError(f"{path}: no array '{key}', but {what}. Arrays in the file: {names}.")
        if found.is_virtual or found.external is not None:
            raise DataError(f"{path}: array '{key}' must be in this file, and not in another.")
        if found.dtype.kind not in "fiub":
            raise DataError(f"{path}: array '{key}' must be of numbers; got {found.dtype}.")
        chunk = math.prod(found.chunks or ()) * found.dtype.itemsize
        stored = min(found.id.get_storage_size(), path.stat().st_size)
        if (size := max(found.nbytes, chunk)) > _DEFLATE * stored:
            rule = f"takes {size} bytes, but only {stored} are stored"
            raise DataError(f"{path}: array '{key}' {rule}.")
    except DataError:
        raise
    except Exception as error:  # h5py raises many types
        raise DataError(f"{path}: missing, damaged, or not HDF5 ({error}).") from error
    return H5Array(path, found)


class ClipFiles:
    """Features float32 [N, T, ..., C] of clips, each of which is read when it is indexed.

    Args:
        name: Name of the modality, for messages.
        clips: What `read` takes for each clip.
        read: Reads the features of a clip, [T', ..., C].
        shape: Shape (T, ..., C) of a clip, see `fit_length`.
    """

    def __init__(
        self, name: str, clips: Sequence[Any], read: Callable[[Any], Array], shape: tuple[int, ...]
    ) -> None:
        self.name, self.clips, self.read = name, clips, read
        self.shape = (len(clips), *shape)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Read the clips with these indices.

        Raises:
            DataError: A file is missing or damaged, or a clip has another shape.
        """
        found = torch.empty(len(rows), *self.shape[1:])
        for out, n in zip(found, rows.tolist(), strict=True):
            clip = self.clips[n]
            array = fit_length(f"{clip}: {self.name}", self.read(clip), self.shape[1:])
            out[:] = torch.from_numpy(array)
        return found


def fit_length(where: str, array: Array, shape: tuple[int, ...]) -> Array:
    """Cut [T', ...] to T segments, or repeat the last one: float32 [T, ...].

    Raises:
        DataError: The array is empty, or not finite, or of another shape than (T', *shape[1:]).
    """
    if array.ndim != len(shape) or array.shape[1:] != shape[1:] or len(array) == 0:
        raise DataError(f"{where} must be {list(shape)}; got {list(array.shape)}.")
    fitted = array[np.minimum(np.arange(shape[0]), len(array) - 1)].astype(np.float32)
    if not np.isfinite(fitted).all():
        raise DataError(f"{where} must be finite; got NaN or Inf.")
    return fitted
