"""The released sets: features, events and splits of their clips."""

from __future__ import annotations

import csv
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from einops import repeat
from torch import Tensor
from torch.nn.functional import one_hot

from ..clips import BACKGROUND, PRETRAIN, TEST, TRAIN, Clips
from ..containers import Rows
from ..errors import DataError
from .arrays import Array, ClipFiles, read_h5, read_zip

SEGMENTS = 10
_SHAPES = {"audio": (SEGMENTS, 128), "video": (SEGMENTS, 7, 7, 512)}
_SPLITS = {"train": PRETRAIN, "val": TRAIN, "test": TEST}


@dataclass(frozen=True)
class ReleasedSet:
    """N clips of T segments with events of K categories.

    Attributes:
        ids: Names of the clips.
        features: Name -> float32 [N, T, ..., C], read when indexed.
        events: Name -> bool [N, T, K], the events of each segment; there may be several at once.
        labels: int64 [N], the class of each clip: its longest event.
        split: int64 [N], one of PRETRAIN, TRAIN and TEST.
        categories: Names of the K categories.
        prompts: Category -> sentence; may be empty.
    """

    ids: tuple[str, ...]
    features: dict[str, Rows]
    events: dict[str, Tensor]
    labels: Tensor
    split: Tensor
    categories: tuple[str, ...]
    prompts: dict[str, str] = field(default_factory=dict)

    def clips(self) -> Clips:
        """Convert to `Clips`, with one event for each segment: of several, the clip's own class.

        Labels of the pre-training clips are replaced by -1.
        """
        hidden = self.split == PRETRAIN
        segments: dict[str, Tensor] = {}
        for name, events in self.events.items():
            own = one_hot(self.labels, len(self.categories))[:, None]
            best = (events * (1 + own)).max(-1)  # [N, T]; the clip's own class has priority
            shown = torch.where(best.values > 0, best.indices, BACKGROUND)
            segments[name] = torch.where(hidden[:, None], BACKGROUND, shown)
        return Clips(
            features=self.features,
            labels=torch.where(hidden, -1, self.labels),
            segment_labels=segments,
            split=self.split,
            video_box=None,
            num_classes=len(self.categories),
            ids=self.ids,
            class_names=self.categories,
        )


def vggsound_avel(root: Path) -> ReleasedSet:
    """VGGSound-AVEL: train clips for pre-training, val clips for the heads, test clips for testing.

    The released code pre-trains on all three, because it uses other sets for the heads.
    """
    rows = read_table(root / "vggsound-avel40k.csv", ("split", "category", "video_id"))
    categories = read_lines(root / "VggsoundAVEL40kCategories.txt")
    prompts = read_table(root / "vggsoundCategories2Prompts.csv", ("label", "prompt"))
    labels = torch.tensor([_position(root, categories, row["category"]) for row in rows])
    ids = tuple(row["video_id"] for row in rows)
    here = [read_zip(root / "label" / "zip" / f"{name}.zip").reshape(-1) for name in ids]
    for name, flags in zip(ids, here, strict=True):
        if len(flags) != SEGMENTS:
            raise DataError(f"{root}: label of {name}: must be [{SEGMENTS}]; got [{len(flags)}].")
    shown = torch.stack([torch.from_numpy(flags != 0) for flags in here])  # [N, T]
    events = in_all_segments(labels, len(categories)) & shown[..., None]
    return ReleasedSet(
        ids=ids,
        features={name: _zips(root / name / "zip", name, ids) for name in _SHAPES},
        events={name: events for name in _SHAPES},
        labels=labels,
        split=torch.tensor([_split(root, row["split"]) for row in rows]),
        categories=categories,
        prompts={row["label"]: row["prompt"] for row in prompts},
    )


def ave(root: Path) -> ReleasedSet:
    """AVE, in the order of its train, val and test lists."""
    orders = {x: _order(root / f"{x}_order.h5") for x in _SPLITS}
    rows = [n for order in orders.values() for n in order]
    split = torch.tensor([_SPLITS[x] for x, order in orders.items() for _ in order])
    return _ave_clips(root, root / "labels.h5", rows, split)


def avvp(root: Path) -> ReleasedSet:
    """AVVP, with separate labels of each modality; half of the clips train the heads, half test.

    The clips are those in both lists. The released lists have no such split, so a checksum of the
    name decides.
    """
    data = root / "data"
    categories = read_lines(data / "AVVP_Categories.txt")
    return _parsed(data, "AVVP_eval", categories, root / "feature")


def ave_avvp(root: Path, ave_root: Path, avvp_root: Path) -> tuple[ReleasedSet, ReleasedSet]:
    """AVE clips to train on and AVVP clips to test on, with the 12 classes they share.

    Args:
        root: Folder with ave_avvp_{labels,order}.h5, AVE_AVVP_Categories.txt, AVE_AVVP_eval_*.csv.
        ave_root: Folder with the HDF5 features of AVE.
        avvp_root: Folder with the features of AVVP, feature/{audio,video}/zip.
    """
    categories = read_lines(root / "AVE_AVVP_Categories.txt")
    rows = _order(root / "ave_avvp_order.h5")
    split = torch.full((len(rows),), TRAIN)
    train = _ave_clips(ave_root, root / "ave_avvp_labels.h5", rows, split, categories)
    return train, _parsed(root, "AVE_AVVP_eval", categories, avvp_root / "feature")


def ucf_vggsound(root: Path) -> tuple[ReleasedSet, ReleasedSet]:
    """Video of UCF101 and audio of VGGSound: unpaired clips of the same 16 classes.

    Args:
        root: Folder with ucf2vggsound.csv, vggsound2ucf.csv, UCF101/feature/video/zip,
            vggsound40k/feature/audio/zip, and two lists of the classes in the same order:
            UCF101sameVGGSound.txt and VGGSoundsameUCF101.txt.
    """
    sets = (
        ("video", "ucf2vggsound.csv", "UCF101sameVGGSound.txt", "UCF101/feature/video/zip"),
        ("audio", "vggsound2ucf.csv", "VGGSoundsameUCF101.txt", "vggsound40k/feature/audio/zip"),
    )
    ucf, vggsound = (
        _one_modality(root, name, root / table, read_lines(root / names), root / zips)
        for name, table, names, zips in sets
    )
    if len(ucf.categories) != len(vggsound.categories):
        raise DataError(f"{root}: the two lists of classes must have the same length.")
    return ucf, vggsound


def read_table(path: Path, columns: Sequence[str], separator: str = ",") -> list[dict[str, str]]:
    """Read a table with a header: a dict of column -> text for each row.

    Raises:
        DataError: The file is missing, has no rows, or lacks a column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, delimiter=separator))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a table ({error}).") from error
    for row in rows or [{}]:
        if any(row.get(column) is None for column in columns):
            raise DataError(f"{path}: needs the columns {', '.join(columns)}; got {row}.")
    return rows


def read_lines(path: Path) -> tuple[str, ...]:
    """Read the lines of a file that are not empty.

    Raises:
        DataError: The file is missing, or a line occurs twice.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error
    names = tuple(filter(None, lines))
    if len(set(names)) != len(names):
        raise DataError(f"{path}: must name each category once.")
    return names


def _parsed(folder: Path, stem: str, categories: tuple[str, ...], features: Path) -> ReleasedSet:
    """A set with a table of event onsets and offsets for each modality."""
    tables = {"audio": f"{stem}_audio_checked_combined.csv"}
    tables["video"] = f"{stem}_visual_checked_combined.csv"
    found: dict[str, dict[str, Tensor]] = {}
    for name, file in tables.items():
        columns = ("filename", "event_labels", "onset", "offset")
        rows = read_table(folder / file, columns, "\t")
        found[name] = {
            row["filename"][:11]: _events(folder / file, row, categories) for row in rows
        }
    ids = tuple(x for x in found["audio"] if x in found["video"])
    events = {name: torch.stack([of[x] for x in ids]) for name, of in found.items()}
    return ReleasedSet(
        ids=ids,
        features={name: _zips(features / name / "zip", name, ids) for name in _SHAPES},
        events=events,
        labels=_longest(torch.cat(list(events.values()), 1)),
        split=torch.tensor([(TRAIN, TEST)[zlib.crc32(x.encode()) % 2] for x in ids]),
        categories=categories,
    )


def _events(path: Path, row: dict[str, str], categories: tuple[str, ...]) -> Tensor:
    """Events [T, K] of a row: comma-separated names, and onsets and offsets in segments."""
    names = row["event_labels"].split(",")
    try:
        times = [[int(x) for x in row[key].split(",")] for key in ("onset", "offset")]
        events = torch.zeros(SEGMENTS, len(categories), dtype=torch.bool)
        for name, onset, offset in zip(names, *times, strict=True):
            events[onset:offset, _position(path, categories, name)] = True
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        rule = "event_labels, onset and offset must be comma-separated lists of the same length"
        raise DataError(f"{path}: {row['filename']}: {rule}; got {row}.") from error
    return events


def _one_modality(
    root: Path, modality: str, table: Path, categories: tuple[str, ...], zips: Path
) -> ReleasedSet:
    rows = read_table(table, ("video_id", "category"))
    ids = tuple(row["video_id"] for row in rows)
    labels = torch.tensor([_position(root, categories, row["category"]) for row in rows])
    return ReleasedSet(
        ids=ids,
        features={modality: _zips(zips, modality, ids)},
        events={modality: in_all_segments(labels, len(categories))},
        labels=labels,
        split=torch.full((len(rows),), TRAIN),
        categories=categories,
    )


def in_all_segments(labels: Tensor, K: int) -> Tensor:
    """Events of clips that show their class in every segment: int64 [N] -> bool [N, T, K]."""
    return repeat(one_hot(labels, K).bool(), "n k -> n t k", t=SEGMENTS)


def _zips(folder: Path, name: str, ids: Sequence[str]) -> ClipFiles:
    return ClipFiles(name, [folder / f"{x}.zip" for x in ids], read_zip, _SHAPES[name])


def _position(path: Path, categories: tuple[str, ...], name: str) -> int:
    if name not in categories:
        raise DataError(f"{path}: category '{name}' is not in the list of categories.")
    return categories.index(name)


def _split(path: Path, name: str) -> int:
    if name not in _SPLITS:
        raise DataError(f"{path}: split must be one of {', '.join(_SPLITS)}; got '{name}'.")
    return _SPLITS[name]


def _order(path: Path) -> list[int]:
    """The numbers of clips in an order file."""
    order = read_h5(path, "order")[:]
    if order.ndim != 1 or order.size == 0 or (order < 0).any() or (order % 1 != 0).any():
        raise DataError(f"{path}: must be numbers of clips [N], from 0; got {list(order.shape)}.")
    return [int(n) for n in order]


def _ave_clips(
    root: Path, path: Path, rows: Sequence[int], split: Tensor, categories: tuple[str, ...] = ()
) -> ReleasedSet:
    """The clips `rows` of AVE with the labels of a file, whose last column is the background."""
    labels = read_h5(path, "avadataset")[:]
    if labels.ndim != 3 or labels.shape[1] != SEGMENTS or max(rows) >= len(labels):
        rule = f"must be [clips, {SEGMENTS}, K + 1], with all clips of the order file"
        raise DataError(f"{path}: {rule}; got {list(labels.shape)}.")
    events = torch.from_numpy(labels[rows][..., :-1] > 0)
    if categories and len(categories) != events.shape[-1]:
        rule = f"must have a column for each of {len(categories)} categories and the background"
        raise DataError(f"{path}: {rule}; got {labels.shape[-1]} columns.")
    files = {"audio": root / "audio_feature.h5", "video": root / "visual_feature.h5"}
    return ReleasedSet(
        ids=tuple(map(str, rows)),
        features={
            name: ClipFiles(name, rows, partial(_ave_features, file), _SHAPES[name])
            for name, file in files.items()
        },
        events=dict.fromkeys(_SHAPES, events),
        labels=_longest(events),
        split=split,
        categories=categories or tuple(f"event {k}" for k in range(events.shape[-1])),
    )


def _ave_features(path: Path, clip: int) -> Array:
    return read_h5(path, "avadataset")[clip]  # opened anew, as processes cannot share an open file


def _longest(events: Tensor) -> Tensor:
    """The event of each clip with the most segments: bool [N, T, K] -> int64 [N]."""
    return events.sum(1).argmax(-1)
