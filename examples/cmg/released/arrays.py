"""Arrays from files that are not trusted: zips of one pickle, and HDF5."""

from __future__ import annotations

import os
import pickle
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
_ARRAY_PARTS = {  # what a pickled array is made of
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


class _ArraysOnly(pickle.Unpickler):
    """Refuses every name but those of a numpy array."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_PARTS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def unpickle_array(file: BinaryIO) -> Array:
    """The one numeric array that a pickle holds; nothing else is ever built.

    Raises:
        pickle.UnpicklingError: It holds something else, or is damaged.
    """
    try:
        array = _ArraysOnly(file, encoding="latin1").load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise pickle.UnpicklingError(f"damaged: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        raise pickle.UnpicklingError("it holds no numeric array")
    return array


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
