"""Read arrays from files that are not trusted: zips with one pickle, and HDF5."""

from __future__ import annotations

import pickle
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import DataError
from ..files import cache_folder

Array = np.ndarray[Any, np.dtype[Any]]
_LARGEST = 2**28  # maximum bytes of a clip's pickle; the largest released one has 1 MB
_NUMBER = re.compile(r"[fiub]\d{1,2}")


class _Type:
    """Replaces numpy.dtype in a pickle: a code such as "f4", and the byte order."""

    def __init__(self, code: str, *_: object) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _Array:
    """Replaces an array in a pickle; `build` checks its description and makes the array."""

    def __init__(self, *_: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state[1:5]

    @classmethod
    def from_buffer(cls, buffer: Any, dtype: Any, shape: Any, order: Any) -> _Array:
        array = cls()
        array.state = shape, dtype, order == "F", buffer
        return array

    def build(self) -> Array:
        shape, dtype, fortran, raw = self.state
        if not isinstance(dtype, _Type) or not _NUMBER.fullmatch(dtype.code):
            raise ValueError("it has no numbers")
        kind = np.dtype(dtype.order.replace("|", "=") + dtype.code)
        flat = np.frombuffer(bytes(memoryview(raw)), kind)
        return flat.reshape(shape, order="F" if fortran else "C").astype(kind.newbyteorder("="))


def _encode(text: str, codec: str) -> bytes:
    return text.encode({"latin1": "latin1"}[codec])


_PARTS = {  # the names in the pickle of an array
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _Array.from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _Array.from_buffer,
    ("_codecs", "encode"): _encode,
}


class _ArraysOnly(pickle._Unpickler):  # in Python: the one in C fails on damaged buffers
    """Replaces the parts of an array by the classes above, and refuses every other name.

    The constructors of numpy are not used, because they trust the dtype in a pickle.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PARTS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _PARTS[module, name]


def unpickle_array(file: BinaryIO) -> Array:
    """Read the array of numbers in a pickle, without executing anything.

    Raises:
        pickle.UnpicklingError: The pickle has other content, or is damaged.
    """
    try:
        found = _ArraysOnly(file, encoding="latin1").load()
        if not isinstance(found, _Array):
            raise pickle.UnpicklingError("it has no array")
        return found.build()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise pickle.UnpicklingError(f"damaged: {error}") from error


def read_zip(path: Path) -> Array:
    """Read the array of a zip with one .pkl file.

    Raises:
        DataError: The file is missing, damaged, or has other content.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (member,) = (x for x in archive.infolist() if x.filename.endswith(".pkl"))
            if member.file_size > _LARGEST:
                raise pickle.UnpicklingError(f"{member.file_size} bytes are too many")
            with archive.open(member) as file:
                return unpickle_array(file)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, but it is in the list of clips.") from None
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError, zlib.error) as error:
        raise DataError(f"{path}: must be a zip of one pickled numpy array ({error}).") from error
    except zipfile.BadZipFile as error:
        raise DataError(f"{path}: not a zip, or cut short ({error}).") from error


def read_h5(path: Path, key: str) -> Any:
    """Open an array of an HDF5 file; index it to read.

    Raises:
        DataError: The file or the key is missing, or h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise DataError(f"{path}: needs h5py. Hint: pip install h5py") from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: missing, damaged, or not HDF5 ({error}).") from error
    if not isinstance(file.get(key), h5py.Dataset):
        raise DataError(
            f"{path}: no array '{key}'. Arrays in the file: {', '.join(file) or 'none'}."
        )
    return file[key]


def stack(
    name: str, clips: Sequence[Any], read: Callable[[Any], Array], shape: tuple[int, ...]
) -> Tensor:
    """Stack the features of all clips into float32 [N, *shape], in a temporary file.

    The operating system can move this memory to disk: 40,000 clips of video take 40 GB.

    Args:
        name: Name of the modality, for the progress bar and errors.
        clips: The argument of `read` for each clip.
        read: Reads the features of a clip, [T', ...].
        shape: Shape (T, ...) of a clip, see `fit_length`.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        out = np.memmap(file, np.float32, "w+", shape=(len(clips), *shape))
    for row, clip in zip(out, tqdm(clips, desc=f"reading {name}", leave=False), strict=True):
        row[:] = fit_length(f"{clip}: {name}", read(clip), shape)
    return torch.from_numpy(out)


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
