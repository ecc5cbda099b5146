"""Clips in a data set of Hugging Face `datasets`: Arrow files, on any number of disks or the Hub.

Columns have the names of the arrays of an npz file, and a row is a clip. The files are mapped into
memory and rows are read in any order, so a run of several ranks takes exactly the batches of one.
No code of a data set is executed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .clips import Clips
from .containers import Array, Header, to_tensor
from .data import Labels, Meta, read_clips
from .errors import DataError, optional_import

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

_SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk writes
_ON_THE_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def load_datasets(
    source: str, modalities: Sequence[str] | None = None, labels: Labels = "required"
) -> Clips:
    """Open a data set and check it. Features are left on disk.

    Args:
        source: A folder that `save_to_disk` wrote, or what `datasets.load_dataset` takes: a folder
            of Parquet files or a name on the Hub. All its splits are taken together, in order: the
            column "split" says what a clip is for.
        modalities: The modalities to read; None: all.
        labels: As in `load_clips`.

    Raises:
        DataError: `datasets` is not installed, there is no such data set, or a column is missing
            or malformed.
    """
    dataset = _open(source)
    column = dataset.features.get("labels")
    names = tuple(getattr(column, "names", None) or ())  # of a ClassLabel
    clips = read_clips(ArrowArrays(source, dataset), Meta(class_names=names), modalities, labels)
    folders = {Path(x["filename"]).absolute().parent for x in dataset.cache_files}
    return replace(clips, folder=folders.pop() if len(folders) == 1 else None)


def _open(source: str) -> Dataset:
    where = f"datasets:{source}"
    with optional_import(where, "pip install datasets"):
        import datasets
    path = Path(source)
    if not path.is_dir() and not _ON_THE_HUB.fullmatch(source):
        raise DataError(f"{where}: no such folder. Hint: see --data in --help.")
    try:
        if any((path / file).is_file() for file in _SAVED):
            found = datasets.load_from_disk(source, keep_in_memory=False)
            if isinstance(found, datasets.DatasetDict):
                found = datasets.concatenate_datasets([*found.values()])
        else:
            found = datasets.load_dataset(source, split="all", keep_in_memory=False)
        if not len(found):
            raise ValueError("it has no rows")
    except Exception as error:  # many types, also those of the file system and of the network
        rule = "cannot be opened" if path.is_dir() else "neither a folder nor on the Hub"
        text = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{where}: {rule} ({text:.300}).") from error
    return found


class ArrowArrays:
    """The columns of a data set as arrays.

    Args:
        source: Folder or name, for messages.
        dataset: The data set, of one row or more.
    """

    def __init__(self, source: str, dataset: Dataset) -> None:
        self.path, self.dataset = Path(source), dataset.with_format("arrow")
        self.names = tuple(dataset.column_names)

    def header(self, name: str) -> Header:
        """Type of a column, and its shape by the first row; of type object if it has no shape."""
        N = len(self.dataset)
        try:
            first = _dense(self._column(name)[:1].column(0).chunk(0))
        except ValueError:
            return Header(np.dtype(object), (N,))
        dtype = np.dtype(str) if first.dtype.kind == "U" else first.dtype  # without a length
        return Header(dtype, (N, *first.shape[1:]))

    def read(self, name: str) -> Array:
        """The column. Columns whose rows differ in shape are refused."""
        shape = self.header(name).shape[1:]
        try:
            chunks = [_dense(x, shape) for x in self._column(name)[:].column(0).chunks]
        except ValueError as error:
            raise _unreadable(self.where(name), error) from error
        return np.concatenate(chunks)

    def features(self, name: str) -> ArrowRows:
        """Features that are read when indexed."""
        return ArrowRows(self._column(name), self.header(name), self.where(name))

    def where(self, name: str) -> str:
        """The column, for messages."""
        return f"{self.path}: {name}"

    def _column(self, name: str) -> Dataset:
        return self.dataset.select_columns([name])


class ArrowRows:
    """A column as `Rows`.

    Args:
        column: The data set of this column, in the format "arrow".
        header: Type and shape of the column.
        where: The column, for messages.
    """

    def __init__(self, column: Dataset, header: Header, where: str) -> None:
        self.column, self.where = column, where
        self.dtype, self.shape = header

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Read rows: float32, or float16 where the data set holds float16.

        Raises:
            DataError: A row has another shape than the first.
        """
        x = np.empty((len(rows), *self.shape[1:]), self.dtype)
        start = 0
        try:
            for chunk in filter(len, self.column[rows.tolist()].column(0).chunks):
                x[start : start + len(chunk)] = _dense(chunk, self.shape[1:])
                start += len(chunk)
        except ValueError as error:
            raise _unreadable(self.where, error) from error
        return to_tensor(x)


def _dense(array: pyarrow.Array, expected: tuple[int, ...] | None = None) -> Array:
    """Rows as [n, ...], without a copy if they hold numbers.

    Args:
        array: Rows that are numbers, bools, texts, or nested lists of these.
        expected: Shape of a row; None: any.

    Raises:
        ValueError: Rows differ in shape, or hold nothing or something else.
    """
    import pyarrow as pa

    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    shape = [len(array)]
    while True:
        if isinstance(array, pa.ExtensionArray):  # Array2D to Array5D
            array = array.storage
        if array.null_count:
            raise ValueError("a value is missing")
        if not any(is_list(array.type) for is_list in lists):
            break
        lengths = array.value_lengths().to_numpy()
        shape.append(int(lengths[0]) if len(lengths) else 0)
        if (lengths != shape[-1]).any():
            raise ValueError("clips differ in length")
        array = array.flatten()
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        values = array.to_numpy(zero_copy_only=False).astype(str)
    elif pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        values = array.to_numpy()
    elif pa.types.is_boolean(array.type):
        values = array.to_numpy(zero_copy_only=False)
    else:
        raise ValueError(f"it holds {array.type}, not numbers")
    if expected is not None and tuple(shape[1:]) != expected:
        raise ValueError(f"clips differ in shape: {shape[1:]} and {[*expected]}")
    found: Array = values.reshape(shape)
    return found


def _unreadable(where: str, error: ValueError) -> DataError:
    pad = " Hint: pad clips to one T, and mark the rest in mask_NAME."
    return DataError(f"{where}: cannot be read ({error}).{pad if 'differ' in str(error) else ''}")
