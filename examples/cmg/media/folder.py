"""A folder of media files: the files of each clip, its label and its split.

    clips/<id>.mp4        picture and sound; files in the folder itself count too
    video/<id>.mp4        picture, and the sound if there is no audio/<id>.wav
    audio/<id>.wav        sound; it takes the place of the sound inside a video
    captions/<id>.txt     one line for the clip, or one for each segment (an empty line: none)
    clips.csv             columns id, label and split, the last two optional

Other formats that FFmpeg can read also work (mkv, webm, mov, avi; flac, mp3, ogg, m4a). <id> may
have folders in it: clips/dog/1.mp4 is the clip "dog/1"; it gets no label from that. One kind of
file is enough for a clip. A split is pretrain, train, test or validation, or 0, 1, 2 or 3. Clips
that are not in clips.csv belong to pretrain; without the file, all do. If it has no column split,
about a quarter of the clips of each class goes to train, a quarter to test, and the rest to
pretrain, by a hash of the id.
"""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..clips import MOST_CLASSES, PRETRAIN, SPLITS, TEST, TRAIN, VALIDATION
from ..errors import DataError

TABLE = "clips.csv"
VIDEO = "mp4 m4v mov mkv webm avi mpg mpeg ts wmv flv ogv 3gp".split()
AUDIO = "wav flac mp3 ogg oga opus m4a aac wma aiff aif".split()
NAMES = {
    "pretrain": PRETRAIN, "pre-train": PRETRAIN, "train": TRAIN, "test": TEST,
    "validation": VALIDATION, "val": VALIDATION,
} | {str(number): number for number in SPLITS.values()}  # fmt: skip
_FOLDERS = {"": VIDEO, "clips": VIDEO, "video": VIDEO, "audio": AUDIO, "captions": ["txt"]}
_UNSEEN = (TRAIN, TEST, PRETRAIN, PRETRAIN)  # splits of the clips of a class, in turn


@dataclass(frozen=True)
class Source:
    """The files of a clip.

    Attributes:
        id: Name of the clip.
        picture: The file with the picture, or None.
        sound: The file with the sound, or None; the same as `picture` if that is to be looked into.
        captions: The file with the captions, or None.
        label: Name of the class; empty if it has none.
        split: PRETRAIN, TRAIN, TEST or VALIDATION.
    """

    id: str
    picture: Path | None
    sound: Path | None
    captions: Path | None
    label: str = ""
    split: int = PRETRAIN


@dataclass(frozen=True)
class MediaFolder:
    """The clips of a folder, in the order of their ids.

    Attributes:
        path: The folder.
        sources: Files of the clips.
        notes: Files that are not read, and rows of clips.csv that have no file: (file or id,
            folder or "clips.csv", what is wrong).
    """

    path: Path
    sources: tuple[Source, ...]
    notes: tuple[tuple[str, str, str], ...] = ()

    def has(self, split: int) -> bool:
        """Whether a clip is in a split."""
        return any(source.split == split for source in self.sources)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; numbers in their order, other names in alphabetical order."""
        names = {source.label for source in self.sources if source.label}
        numbers = all(name.isdecimal() and len(name) < 19 for name in names)
        return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))


def is_media_folder(path: str | Path) -> bool:
    """Whether a path is a folder without .npy files, so that it is not a data set."""
    folder = Path(path)
    return folder.is_dir() and not any(folder.glob("[!.]*.npy"))


def open_folder(path: str | Path) -> MediaFolder:
    """Find the clips of a folder.

    Raises:
        DataError: There is no clip, two files have the same id, or clips.csv is malformed.
    """
    folder = Path(path)
    try:
        parts = {part: _by_id(folder, part) for part in _FOLDERS}
        rows = _read_table(folder / TABLE)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error}).") from error
    found = {part: files for part, (files, _) in parts.items()}
    pictures = _merge(folder, found[""], found["clips"], found["video"])
    ids = {*pictures, *found["audio"], *found["captions"]}
    if not ids:
        places = f"videos in {folder}, clips or video, sounds in audio, captions in captions"
        raise DataError(f"{folder}: has no media files. Hint: put {places}.")
    notes = [
        (
            _shown(path.relative_to(folder).as_posix()),
            part,
            "not read: an unknown kind of file here",
        )
        for part, (_, others) in parts.items()
        for path in sorted(others)
    ]
    given: dict[str, tuple[str, int | None]] = {}
    for row, label, split in rows:
        name, _, suffix = row.rpartition(".")
        if row in ids or suffix.lower() not in (*VIDEO, *AUDIO):
            name = row
        if name not in ids:
            notes.append((row, TABLE, "has no file"))
        elif name in given:
            raise DataError(f"{folder / TABLE}: {row} is listed twice.")
        else:
            given[name] = label, split
    sources = []
    for name in sorted(ids):
        picture = pictures.get(name)
        label, split = given.get(name, ("", PRETRAIN))
        sources.append(
            Source(
                name,
                picture,
                found["audio"].get(name, picture),
                found["captions"].get(name),
                label,
                PRETRAIN if split is None else split,
            )
        )
    if rows and all(split is None for _, _, split in rows):
        sources = _divided(sources)
    classes = len({source.label for source in sources} - {""})
    if classes > MOST_CLASSES:
        rule = f"has {classes} labels, at most {MOST_CLASSES} are allowed"
        raise DataError(f"{folder / TABLE}: {rule}. Hint: is label a column of ids?")
    for source in sources:
        if source.split != PRETRAIN and not source.label:
            hint = "only clips of pretrain may have none"
            raise DataError(f"{folder / TABLE}: {source.id} has no label. Hint: {hint}.")
    return MediaFolder(folder, tuple(sources), tuple(notes))


def _by_id(folder: Path, part: str) -> tuple[dict[str, Path], list[Path]]:
    """The files of a part of the folder by their ids, and those that are not read; no hidden ones.

    Beside the files of clips in the folder itself, there may be any others.
    """
    root, read, others = folder / part, list[Path](), list[Path]()
    for path in root.rglob("*") if part else root.glob("*"):
        hidden = any(piece.startswith(".") for piece in path.relative_to(root).parts)
        if hidden or (path.is_dir() and not path.is_symlink()):
            continue
        known = path.suffix[1:].lower() in _FOLDERS[part] and path.is_file()
        if known and _is_text(path.name):
            read.append(path)
        elif part or known:
            others.append(path)
    ids = ({path.relative_to(root).with_suffix("").as_posix(): path} for path in read)
    return _merge(folder, *ids), others


def _is_text(name: str) -> bool:
    """Whether a name can be written to a file; one with bytes that are not UTF-8 cannot."""
    return name == _shown(name)


def _shown(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def _merge(folder: Path, *parts: Mapping[str, Path]) -> dict[str, Path]:
    merged: dict[str, Path] = {}
    for part in parts:
        for name, path in part.items():
            if name in merged:
                both = " and ".join(str(x.relative_to(folder)) for x in (merged[name], path))
                raise DataError(f"{folder}: {both} have the same id. Hint: rename one.")
            merged[name] = path
    return merged


def _read_table(path: Path) -> list[tuple[str, str, int | None]]:
    """The rows of clips.csv: id, label, and split or None."""
    if not path.exists():
        return []
    rows: list[tuple[str, str, int | None]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, strict=True)
            columns = [x.strip().lower() for x in table.fieldnames or []]
            table.fieldnames = columns
            if len(set(columns)) < len(columns):
                raise DataError(f"{path}: must have each column once; got {', '.join(columns)}.")
            if "id" not in columns:
                got = ", ".join(columns) or "an empty file"
                raise DataError(f"{path}: must have a column id; got {got}.")
            for row in table:
                name, label, split = ((row.get(x) or "").strip() for x in ("id", "label", "split"))
                where = f"{path}, line {table.line_num}"
                if None in row or not name:
                    raise DataError(f"{where}: must have an id and {len(columns)} columns.")
                if not label.isprintable():
                    raise DataError(f"{where}: the label must be printable; got {label!r}.")
                if split.lower() not in NAMES and split:
                    known = "pretrain, train, test or validation"
                    raise DataError(f"{where}: split must be {known}; got {split!r:.40}.")
                rows.append((name, label, NAMES[split.lower()] if split else None))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: must be a CSV file in UTF-8 ({error}).") from error
    return rows


def _divided(sources: list[Source]) -> list[Source]:
    """The same clips, those of each class in turn in the splits of `_UNSEEN`."""
    classes: defaultdict[str, list[str]] = defaultdict(list)
    for source in sources:
        if source.label:
            classes[source.label].append(source.id)
    split = {
        name: _UNSEEN[k % len(_UNSEEN)]
        for names in classes.values()
        for k, name in enumerate(sorted(names, key=lambda x: hashlib.sha1(x.encode()).digest()))
    }
    return [replace(source, split=split.get(source.id, PRETRAIN)) for source in sources]
