"""Write the tokens of clips to a Parquet file: a row for each clip and modality."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from tqdm import tqdm

from .clips import Clips
from .containers import CLIPS_AT_ONCE
from .errors import DataError, optional_import
from .files import write_atomic
from .trained import TrainedModel

if TYPE_CHECKING:
    import pyarrow

GROUP = 10_000  # rows of a row group, about


def write_tokens(
    path: str | Path, model: TrainedModel, clips: Clips, labels_from: str | None = None
) -> None:
    """Write tokens.parquet.

    Columns are "id" (text; the number of the clip if the data have no ids), "modality", "tokens"
    (list of int32, -1 where not valid), "mask" (list of bool, True = valid), "label" (text, the
    name of the predicted class or its number) and "probability". The last two are null without
    `labels_from`, and for a clip that does not have the modality. Clips are read and written a few
    at a time. The file appears under its name when it is complete.

    Args:
        path: The file to create or replace.
        model: The trained model.
        clips: Clips in some of its modalities, with raw features.
        labels_from: Modality whose labels are used to classify clips; None: they are not.

    Raises:
        DataError: The clips do not fit the model, it has no such classifier, or the file cannot be
            written, or pyarrow is not installed.
    """
    require_parquet(path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    if labels_from is not None:
        model.classify_tokens({}, labels_from)  # raises if there is no such classifier
    columns = [
        ("id", pa.string()),
        ("modality", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("mask", pa.list_(pa.bool_())),
        ("label", pa.string()),
        ("probability", pa.float32()),
    ]
    schema = pa.schema(columns)

    def write(file: BinaryIO) -> None:
        with pq.ParquetWriter(file, schema) as writer:
            rows: list[dict[str, Any]] = []
            for part in _rows(model, clips, labels_from):
                rows += part
                if len(rows) >= GROUP:
                    writer.write_table(_table(rows, schema))
                    rows = []
            if rows:
                writer.write_table(_table(rows, schema))

    write_atomic(path, write)


def require_parquet(path: str | Path) -> None:
    """Check that a Parquet file can be written.

    Raises:
        DataError: pyarrow is not installed, or the path is a folder.
    """
    with optional_import(str(path), "pip install 'mmvq[media]'"):
        import pyarrow.parquet  # noqa: F401
    if Path(path).is_dir():
        raise DataError(f"{path}: is a folder. Hint: --output names a file.")


def _table(rows: list[dict[str, Any]], schema: pyarrow.Schema) -> pyarrow.Table:
    import pyarrow as pa

    return pa.Table.from_pylist(rows, schema)


def _rows(
    model: TrainedModel, clips: Clips, labels_from: str | None
) -> Iterator[list[dict[str, Any]]]:
    """The rows of a few clips."""
    N = len(clips.split)
    with tqdm(desc="encoding", total=N, unit="clip", disable=None) as bar:
        for chosen in torch.arange(N).split(CLIPS_AT_ONCE):
            features = {name: clips.read(name, chosen) for name in clips.modalities}
            masks = {name: clips.masks[name][chosen] for name in clips.masks}
            tokens = model.tokens(features, masks)
            classes = {} if labels_from is None else model.classify_tokens(tokens, labels_from)
            rows = []
            for k, n in enumerate(chosen.tolist()):
                for name, i in tokens.items():
                    row = {"id": clips.ids[n] if clips.ids else str(n), "modality": name}
                    row |= {"tokens": i[k].tolist(), "mask": (i[k] >= 0).tolist()}
                    if classes and (label := int(classes[name].label[k])) >= 0:
                        row["label"] = model.class_name(label)
                        row["probability"] = float(classes[name].probability[k])
                    rows.append(row)
            bar.update(len(chosen))
            yield rows
