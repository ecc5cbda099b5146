"""Arrays from files that are not trusted: zips of one pickle, and HDF5."""

from __future__ import annotations

import os
import pickle
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import DataError

Array = np.ndarray[Any, np.dtype[Any]]
_LARGEST = 2**28  # bytes of one clip's pickle; the largest released one has 1 MB
_NUMBER = re.compile(r"[fiub]\d{1,2}")


class _Type:
    """Stands for numpy.dtype in a pickle: a code such as "f4", and the order of its bytes."""

    def __init__(self, code: str, *_: object) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _Array:
    """Stands for an array in a pickle, until `build` has checked what it says of itself."""

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
            raise ValueError("it holds no numbers")
        kind = np.dtype(dtype.order.replace("|", "=") + dtype.code)
        flat = np.frombuffer(bytes(memoryview(raw)), kind)
        return flat.reshape(shape, order="F" if fortran else "C").astype(kind.newbyteorder("="))


def _encode(text: str, codec: str) -> bytes:
    return text.encode({"latin1": "latin1"}[codec])


_PARTS = {  # what a pickled array is made of
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _Array.from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _Array.from_buffer,
    ("_codecs", "encode"): _encode,
}


class _ArraysOnly(pickle._Unpickler):  # the one in Python: that in C stumbles over damaged buffers
    """Finds stand-ins for the parts of an array, and refuses every other name.

    Not even numpy's own: its constructors trust a pickle with the insides of a dtype.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PARTS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _PARTS[module, name]


def unpickle_array(file: BinaryIO) -> Array:
    """The one array of numbers that a pickle holds; nothing else is ever built.

    Raises:
        pickle.UnpicklingError: It holds something else, or is damaged.
    """
    try:
        found = _ArraysOnly(file, encoding="latin1").load()
        if not isinstance(found, _Array):
            raise pickle.UnpicklingError("it holds no array")
        return found.build()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise pickle.UnpicklingError(f"damaged: {error}") from error


def read_zip(path: Path) -> Array:
    """The array of a zip with one .pkl file.

    Raises:
        DataError: The file is missing, damaged, or holds something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (member,) = (x for x in archive.infolist() if x.filename.endswith(".pkl"))
            if member.file_size > _LARGEST:
                raise pickle.UnpicklingError(f"{member.file_size} bytes are too many")
            with archive.open(member) as file:
                return unpickle_array(file)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, though the list of clips names it.") from None
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError, zlib.error) as error:
        raise DataError(f"{path}: must be a zip of one pickled numpy array ({error}).") from error
    except zipfile.BadZipFile as error:
        raise DataError(f"{path}: not a zip, or cut short ({error}).") from error


def read_h5(path: Path, key: str) -> Any:
    """An open HDF5 data set: index it to read.

    Raises:
        DataError: The file or the key is missing, or h5py is.
    """
    try:
        import h5py
    except ImportError as error:
        raise DataError(f"{path}: reading it takes h5py. Hint: pip install h5py") from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: missing, damaged, or not HDF5 ({error}).") from error
    if not isinstance(file.get(key), h5py.Dataset):
        raise DataError(
            f"{path}: no array '{key}'. The file holds: {', '.join(file) or 'nothing'}."
        )
    return file[key]


def stack(
    name: str, clips: Sequence[Any], read: Callable[[Any], Array], shape: tuple[int, ...]
) -> Tensor:
    """Features of all clips, float32 [N, *shape], in a file of its own that no path names.

    Such a file is memory that the system may write out: 40,000 clips of video are 40 GB.

    Args:
        name: Of the modality, for the progress bar and errors.
        clips: What `read` takes, one for each clip.
        read: Gives [T', ...]; T' is cut to T, or the last segment repeated.
        shape: T and the rest.
    """
    folder = Path(os.environ.get("MMVQ_CACHE") or "~/.cache/mmvq").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        out = np.memmap(file, np.float32, "w+", shape=(len(clips), *shape))
    for row, clip in zip(out, tqdm(clips, desc=f"reading {name}", leave=False), strict=True):
        array = read(clip)
        if array.ndim != len(shape) or array.shape[1:] != shape[1:] or len(array) == 0:
            raise DataError(f"{clip}: {name} must be {list(shape)}; came {list(array.shape)}.")
        row[:] = array[np.minimum(np.arange(shape[0]), len(array) - 1)]
        if not np.isfinite(row).all():
            raise DataError(f"{clip}: {name} must be finite; NaN or Inf came.")
    return torch.from_numpy(out)


def one_hot_events(classes: Iterable[int], T: int, K: int) -> Tensor:
    """Bool [N, T, K]: each clip's class in all its segments."""
    rows = torch.nn.functional.one_hot(torch.tensor(list(classes)), K).bool()
    return rows[:, None].expand(-1, T, -1)
