"""The released sets: which clips there are, what they show when, and who trains on them."""

from __future__ import annotations

import csv
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data import BACKGROUND, PRETRAIN, TEST, TRAIN, Clips
from ..errors import DataError
from .arrays import one_hot_events, read_h5, read_zip, stack

SEGMENTS = 10
_SHAPES = {"audio": (SEGMENTS, 128), "video": (SEGMENTS, 7, 7, 512)}
_SPLITS = {"train": PRETRAIN, "val": TRAIN, "test": TEST}


@dataclass(frozen=True)
class ReleasedSet:
    """N clips of T segments and K kinds of event.

    Attributes:
        ids: Of the clips.
        features: Name -> float32 [N, T, ..., C].
        events: Name -> bool [N, T, K], what the modality shows when; several at once may be.
        labels: int64 [N], the class of the clip; of several events the longest.
        split: int64 [N] of PRETRAIN, TRAIN and TEST.
        categories: The K names.
        prompts: Category -> its sentence; may be empty.
    """

    ids: tuple[str, ...]
    features: dict[str, Tensor]
    events: dict[str, Tensor]
    labels: Tensor
    split: Tensor
    categories: tuple[str, ...]
    prompts: dict[str, str]

    def multi_hot(self, name: str) -> Tensor:
        """As the release has labels: [N, T, K + 1] of 0 and 1, the last column the background."""
        events = self.events[name]
        return torch.cat([events, ~events.any(-1, keepdim=True)], -1).float()

    def clips(self) -> Clips:
        """With one event a segment: the clip's own class where that is among several.

        Labels of the pre-training clips become -1: nothing later can read them.
        """
        hidden = self.split == PRETRAIN
        segments: dict[str, Tensor] = {}
        for name, events in self.events.items():
            own = torch.nn.functional.one_hot(self.labels, len(self.categories))[:, None]
            best = (events * (1 + own)).max(-1)  # [N, T]; the clip's own class counts double
            shown = torch.where(best.values > 0, best.indices, BACKGROUND)
            segments[name] = torch.where(hidden[:, None], BACKGROUND, shown)
        return Clips(
            features=self.features,
            labels=torch.where(hidden, -1, self.labels),
            segment_labels=segments,
            split=self.split,
            video_box=None,
            num_classes=len(self.categories),
        )


def vggsound_avel(root: Path) -> ReleasedSet:
    """VGGSound-AVEL: its train clips pre-train, val clips train the heads, test clips test.

    The release pre-trains on all three; its downstream sets are others.
    """
    rows = read_table(root / "vggsound-avel40k.csv", ("split", "category", "video_id"))
    categories = read_lines(root / "VggsoundAVEL40kCategories.txt")
    prompts = read_table(root / "vggsoundCategories2Prompts.csv", ("label", "prompt"))
    labels = torch.tensor([_position(root, categories, row["category"]) for row in rows])
    ids = tuple(row["video_id"] for row in rows)
    here = [read_zip(root / "label" / "zip" / f"{name}.zip").reshape(-1) for name in ids]
    for name, flags in zip(ids, here, strict=True):
        if len(flags) != SEGMENTS:
            raise DataError(f"{root}: label of {name}: must be [{SEGMENTS}]; came [{len(flags)}].")
    shown = torch.stack([torch.from_numpy(flags != 0) for flags in here])  # [N, T]
    events = one_hot_events(labels.tolist(), SEGMENTS, len(categories)) & shown[..., None]
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
    orders = {x: read_h5(root / f"{x}_order.h5", "order")[:].astype(int) for x in _SPLITS}
    rows = [int(n) for order in orders.values() for n in order]
    events = _ave_events(root / "labels.h5", rows)
    return ReleasedSet(
        ids=tuple(map(str, rows)),
        features=_ave_features(root, rows),
        events=dict.fromkeys(_SHAPES, events),
        labels=_longest(events),
        split=torch.tensor([_SPLITS[x] for x, order in orders.items() for _ in order]),
        categories=tuple(f"event {k}" for k in range(events.shape[-1])),
        prompts={},
    )


def avvp(root: Path) -> ReleasedSet:
    """AVVP: labels of each modality apart; half of the clips train the heads, half test.

    Clips that both lists name; the halves by a checksum of the name, as the release has none.
    """
    data = root / "data"
    categories = read_lines(data / "AVVP_Categories.txt")
    return _parsed(data, "AVVP_eval", categories, root / "feature")


def ave_avvp(root: Path, ave_root: Path, avvp_root: Path) -> tuple[ReleasedSet, ReleasedSet]:
    """AVE clips to train on and AVVP clips to test on, with the 12 classes they share.

    Args:
        root: ave_avvp_{labels,order}.h5, AVE_AVVP_Categories.txt, AVE_AVVP_eval_*.csv.
        ave_root: The HDF5 features of AVE.
        avvp_root: The features of AVVP, feature/{audio,video}/zip.
    """
    categories = read_lines(root / "AVE_AVVP_Categories.txt")
    rows = [int(n) for n in read_h5(root / "ave_avvp_order.h5", "order")[:]]
    events = _ave_events(root / "ave_avvp_labels.h5", rows)
    train = ReleasedSet(
        ids=tuple(map(str, rows)),
        features=_ave_features(ave_root, rows),
        events=dict.fromkeys(_SHAPES, events),
        labels=_longest(events),
        split=torch.full((len(rows),), TRAIN),
        categories=categories,
        prompts={},
    )
    return train, _parsed(root, "AVE_AVVP_eval", categories, avvp_root / "feature")


def ucf_vggsound(root: Path) -> tuple[ReleasedSet, ReleasedSet]:
    """Video of UCF101 and audio of VGGSound: unpaired clips of 16 classes, line by line the same.

    Args:
        root: ucf2vggsound.csv, vggsound2ucf.csv, UCF101sameVGGSound.txt, VGGSoundsameUCF101.txt,
            UCF101/feature/video/zip, vggsound40k/feature/audio/zip.
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
        raise DataError(f"{root}: the two lists of classes must be as long as each other.")
    return ucf, vggsound


def read_table(path: Path, columns: Sequence[str], separator: str = ",") -> list[dict[str, str]]:
    """The rows of a table with a header, as name -> text.

    Raises:
        DataError: The file is missing, or has no rows, or not these columns.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, delimiter=separator))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a table ({error}).") from error
    for row in rows or [{}]:
        if any(row.get(column) is None for column in columns):
            raise DataError(f"{path}: needs the columns {', '.join(columns)}; came {row}.")
    return rows


def read_lines(path: Path) -> tuple[str, ...]:
    """The lines of a file that are not empty.

    Raises:
        DataError: The file is missing, or a line comes twice.
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
    """A set whose events stand in two tables of onsets and offsets."""
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
        prompts={},
    )


def _events(path: Path, row: dict[str, str], categories: tuple[str, ...]) -> Tensor:
    """Bool [T, K] of one row: comma lists of names, onsets and offsets in segments."""
    names = row["event_labels"].split(",")
    try:
        times = [[int(x) for x in row[key].split(",")] for key in ("onset", "offset")]
        events = torch.zeros(SEGMENTS, len(categories), dtype=torch.bool)
        for name, onset, offset in zip(names, *times, strict=True):
            events[onset:offset, _position(path, categories, name)] = True
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        rule = "event_labels, onset and offset must be comma lists of one length"
        raise DataError(f"{path}: {row['filename']}: {rule}; came {row}.") from error
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
        events={modality: one_hot_events(labels.tolist(), SEGMENTS, len(categories))},
        labels=labels,
        split=torch.full((len(rows),), TRAIN),
        categories=categories,
        prompts={},
    )


def _zips(folder: Path, name: str, ids: Sequence[str]) -> Tensor:
    return stack(name, [folder / f"{x}.zip" for x in ids], read_zip, _SHAPES[name])


def _position(path: Path, categories: tuple[str, ...], name: str) -> int:
    if name not in categories:
        raise DataError(f"{path}: category '{name}' is not in the list of categories.")
    return categories.index(name)


def _split(path: Path, name: str) -> int:
    if name not in _SPLITS:
        raise DataError(f"{path}: split must be one of {', '.join(_SPLITS)}; came '{name}'.")
    return _SPLITS[name]


def _ave_features(root: Path, rows: Sequence[int]) -> dict[str, Tensor]:
    files = {"audio": root / "audio_feature.h5", "video": root / "visual_feature.h5"}
    return {
        name: stack(name, rows, read_h5(path, "avadataset").__getitem__, _SHAPES[name])
        for name, path in files.items()
    }


def _ave_events(path: Path, rows: Sequence[int]) -> Tensor:
    """Bool [N, T, K] of the clips `rows`; the file's last column is the background."""
    labels = read_h5(path, "avadataset")[:]
    if labels.ndim != 3 or labels.shape[1] != SEGMENTS or max(rows) >= len(labels):
        rule = f"must be [clips, {SEGMENTS}, K + 1] and have all clips of the order"
        raise DataError(f"{path}: {rule}; came {list(labels.shape)}.")
    return torch.from_numpy(labels[rows][..., :-1] > 0)


def _longest(events: Tensor) -> Tensor:
    """The event with the most segments of each clip, bool [N, T, K] -> int64 [N]."""
    return events.sum(1).argmax(-1)
