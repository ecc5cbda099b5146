"""The data file: what is read, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples.conftest import CLASSES, Arrays, N, T

from cmg.clips import Clips
from cmg.data import load_clips
from cmg.errors import DataError


def write(path: Path, arrays: Arrays) -> Path:
    np.savez(path / "clips.npz", **arrays)
    return path / "clips.npz"


def test_reads_all_modalities_in_file_order(clips: Clips, arrays: Arrays) -> None:
    assert clips.modalities == ("audio", "video", "text")
    assert [x.dtype for x in clips.features.values()] == [
        torch.float32,
        torch.float16,
        torch.float32,
    ]
    for name, x in clips.features.items():
        np.testing.assert_array_equal(x.numpy(), arrays[name].astype(x.numpy().dtype))
    assert clips.num_classes == CLASSES
    assert clips.video_box is not None
    np.testing.assert_array_equal(clips.video_box.numpy(), arrays["video_box"])
    assert torch.equal(clips.rows(1, 2), torch.arange(60, N))


def test_reads_the_named_modalities_in_the_order_named(clips_path: Path) -> None:
    clips = load_clips(clips_path, ["text", "audio"])
    assert clips.modalities == tuple(clips.segment_labels) == ("text", "audio")


def test_labels_of_split_0_are_never_read(clips: Clips, arrays: Arrays) -> None:
    pretrain = clips.rows(0)
    assert (clips.labels[pretrain] == -1).all()
    for name, segments in clips.segment_labels.items():
        assert (segments[pretrain] == -1).all()
        rest = clips.rows(1, 2)
        np.testing.assert_array_equal(segments[rest], arrays[f"seg_labels_{name}"][rest])
    rest = clips.rows(1, 2)
    np.testing.assert_array_equal(clips.labels[rest], arrays["labels"][rest])


def test_few_clips_may_show_few_of_many_classes(tmp_path: Path, arrays: Arrays) -> None:
    arrays["labels"] = arrays["labels"] + 500
    clips = load_clips(write(tmp_path, arrays))
    assert clips.num_classes == 500 + CLASSES


def test_optional_arrays_may_be_absent(tmp_path: Path, arrays: Arrays) -> None:
    for name in ("video_box", "seg_labels_audio", "seg_labels_video", "seg_labels_text"):
        del arrays[name]
    clips = load_clips(write(tmp_path, arrays))
    assert clips.segment_labels == {}
    assert clips.video_box is None


def test_other_arrays_are_no_modalities(tmp_path: Path, arrays: Arrays) -> None:
    arrays |= {"rate": np.array(16.0), "names": np.array(["a", "b"]), "weights": np.ones(N)}
    assert load_clips(write(tmp_path, arrays)).modalities == ("audio", "video", "text")


def test_big_endian_and_double_precision_are_read(tmp_path: Path, arrays: Arrays) -> None:
    arrays["audio"] = arrays["audio"].astype(">f8")
    assert load_clips(write(tmp_path, arrays)).features["audio"].dtype == torch.float32


def change(name: str, how: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], object]:
    return lambda arrays: arrays.update({name: how(arrays[name])})


def put(name: str, where: Any, value: float) -> Callable[[Arrays], object]:
    return lambda arrays: arrays[name].__setitem__(where, value)


def drop(name: str) -> Callable[[Arrays], object]:
    return lambda arrays: arrays.pop(name)


BAD: dict[str, tuple[Callable[[Arrays], object], str]] = {
    "labels missing": (drop("labels"), "array 'labels' is missing"),
    "split missing": (drop("split"), "array 'split' is missing"),
    "features missing": (drop("text"), "no modality 'text'"),
    "NaN": (put("audio", (7, 1, 2), np.nan), "audio: must be finite; got NaN or Inf in clip 7"),
    "Inf": (put("video", 5, np.inf), "video: must be finite; got NaN or Inf in clip 5"),
    "overflow": (change("text", lambda x: x * 1e300), "text: must be finite"),
    "rank": (change("text", lambda x: x[:, 0]), "text: must be float [N, T, ..., C]"),
    "integers": (change("audio", lambda x: x.astype(int)), "audio: must be float [N, T, ..., C]"),
    "no channels": (change("audio", lambda x: x[..., :0]), "audio: must be float [N, T, ..., C]"),
    "N": (change("audio", lambda x: x[1:]), f"audio: must have N = {N} clips"),
    "T": (change("text", lambda x: x[:, 1:]), f"text: must have T = {T} segments"),
    "split rank": (change("split", lambda x: x[:, None]), "split: must be int [N]"),
    "split floats": (change("split", lambda x: x.astype(float)), "split: must be int [N]"),
    "split number": (put("split", -1, 4), "split: must hold only 0, 1, 2 and 3; got 4"),
    "no split 0": (change("split", lambda x: x.clip(1)), "split: must have clips of split 0"),
    "no split 1": (put("split", slice(60, 100), 0), "split: must have clips of split 1"),
    "no split 2": (change("split", lambda x: x.clip(0, 1)), "split: must have clips of split 2"),
    "label floats": (change("labels", lambda x: x + 0.5), f"labels: must be int [{N}]"),
    "label shape": (change("labels", lambda x: x[:-1]), f"labels: must be int [{N}]"),
    "label below": (put("labels", -1, -1), "labels: must be 0 to 4095 outside split 0; got -1"),
    "label above": (put("labels", -1, 4096), "labels: must be 0 to 4095 outside split 0"),
    "segment label": (put("seg_labels_video", -1, -2), "seg_labels_video: must be -1 to 4095"),
    "segment label shape": (
        change("seg_labels_text", lambda x: x[:, 1:]),
        f"seg_labels_text: must be int [{N}, {T}]",
    ),
    "box": (change("video_box", lambda x: x[..., :3]), f"video_box: must be int [{N}, {T}, 4]"),
    "one class": (put("labels", slice(None), 0), "labels: must have two classes or more"),
    "pickled features": (change("audio", lambda x: x.astype(object)), "audio: cannot be read"),
    "pickled labels": (change("labels", lambda x: x.astype(object)), "labels: cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("modalities", [None, ("audio", "video", "text")])
def test_bad_arrays_are_named(
    tmp_path: Path, arrays: Arrays, case: str, modalities: tuple[str, ...] | None
) -> None:
    spoil, message = BAD[case]
    spoil(arrays)
    path = write(tmp_path, arrays)
    with pytest.raises(DataError, match="^" + re.escape(f"{path}: {message}")) as error:
        load_clips(path, modalities)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["smell", "labels", "seg_labels_audio"])
def test_unknown_modality_lists_what_there_is(clips_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"no modality '{name}'.*: audio, video, text\."):
        load_clips(clips_path, ["audio", name])


def test_a_modality_is_named_once(clips_path: Path) -> None:
    with pytest.raises(DataError, match="modalities: each name once"):
        load_clips(clips_path, ["audio", "audio"])


def test_a_file_without_modalities(tmp_path: Path, arrays: Arrays) -> None:
    path = write(tmp_path, {name: arrays[name] for name in ("labels", "split")})
    with pytest.raises(DataError, match="has no modality"):
        load_clips(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.npz: no such file"):
        load_clips(tmp_path / "none.npz")


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x04K\x01.", b"PK\x03\x04"])
def test_a_file_that_is_no_npz(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "clips.npz").write_bytes(content)
    with pytest.raises(DataError, match="not an npz file, or cut short"):
        load_clips(tmp_path / "clips.npz")


def test_an_npy_file(tmp_path: Path, arrays: Arrays) -> None:
    np.save(tmp_path / "clips.npy", arrays["audio"])
    with pytest.raises(DataError, match="not an npz file"):
        load_clips(tmp_path / "clips.npy")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(clips_path: Path, tmp_path: Path, share: float) -> None:
    content = clips_path.read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match="cut short"):
        load_clips(tmp_path / "cut.npz")


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_bytes_never_escape_as_another_error(
    tmp_path: Path, arrays: Arrays, compressed: bool
) -> None:
    path = tmp_path / "clips.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    good, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for place in rng.integers(0, len(good), 40):
        damaged = bytearray(good)
        damaged[place : place + 8] = rng.bytes(8)
        path.write_bytes(damaged)
        try:
            assert isinstance(load_clips(path), Clips)  # padding of the archive, not data
        except DataError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(
    ("spoil", "got"),
    [
        (lambda x: x.pop("audio"), "none"),
        (lambda x: x.update(audio=x["audio"][:, :3]), r"\[120, 3, 12\]"),
        (lambda x: x.update(audio=x["audio"][..., :7]), r"\[120, 4, 7\]"),
    ],
)
def test_clips_that_do_not_fit_a_model_are_refused(
    clips: Clips, spoil: Callable[[dict[str, torch.Tensor]], object], got: str
) -> None:
    spoil(clips.features)
    with pytest.raises(DataError, match=rf"model takes audio \[N, 4, \.\.\., 12\]; got {got}\."):
        clips.require("audio", 4, 12, "a run")
