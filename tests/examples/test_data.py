"""The data file: what is read, what is refused and in which words."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cmg.data import Clips, load_clips
from cmg.errors import DataError

N, T, CLASSES = 120, 4, 3
Arrays = dict[str, np.ndarray]


def write(path: Path, arrays: Arrays) -> Path:
    np.savez(path / "clips.npz", **arrays)
    return path / "clips.npz"


def test_reads_all_modalities_in_file_order(clips_path: Path, arrays: Arrays) -> None:
    clips = load_clips(clips_path)
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


def test_labels_of_split_0_are_never_read(clips_path: Path, arrays: Arrays) -> None:
    clips = load_clips(clips_path)
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


def spoil_nan(arrays: Arrays) -> None:
    arrays["audio"][7, 1, 2] = np.nan


def spoil_inf(arrays: Arrays) -> None:
    arrays["video"][5] = np.inf


def put(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], None]:
    def spoil(arrays: Arrays) -> None:
        arrays[name] = change(arrays[name])

    return spoil


def drop(name: str) -> Callable[[Arrays], None]:
    def spoil(arrays: Arrays) -> None:
        del arrays[name]

    return spoil


def label(name: str, value: int) -> Callable[[Arrays], None]:
    def spoil(arrays: Arrays) -> None:
        arrays[name].flat[-1] = value

    return spoil


BAD = {
    "labels missing": (drop("labels"), "array 'labels' is missing. The file holds: audio, "),
    "split missing": (drop("split"), "array 'split' is missing. The file holds: audio, "),
    "features missing": (drop("text"), "no modality 'text'"),
    "NaN": (spoil_nan, "audio: must be finite; came NaN or Inf in clip 7."),
    "Inf": (spoil_inf, "video: must be finite; came NaN or Inf in clip 5."),
    "overflow": (
        put("text", lambda x: x * 1e300),
        "text: must be finite; came NaN or Inf in clip 0.",
    ),
    "rank": (
        put("text", lambda x: x[:, 0]),
        f"text: must be float [N, T, ..., C], none of them 0; came float64[{N}, 9].",
    ),
    "integers": (
        put("audio", lambda x: x.astype(np.int64)),
        f"audio: must be float [N, T, ..., C], none of them 0; came int64[{N}, {T}, 12].",
    ),
    "no channels": (
        put("audio", lambda x: x[..., :0]),
        f"audio: must be float [N, T, ..., C], none of them 0; came float32[{N}, {T}, 0].",
    ),
    "N": (
        put("audio", lambda x: x[1:]),
        f"audio: must have N = {N} clips, as split has; came float32[{N - 1}, {T}, 12].",
    ),
    "T": (
        put("text", lambda x: x[:, 1:]),
        f"text: must have T = {T} segments, as audio has; came float64[{N}, {T - 1}, 9].",
    ),
    "split rank": (
        put("split", lambda x: x[:, None]),
        f"split: must be int [N]; came int8[{N}, 1].",
    ),
    "split floats": (
        put("split", lambda x: x.astype(float)),
        f"split: must be int [N]; came float64[{N}].",
    ),
    "split number": (label("split", 3), "split: must hold only 0, 1 and 2; came 3."),
    "no split 0": (
        put("split", lambda x: x.clip(1)),
        "split: must have clips of split 0 (pre-train); came none.",
    ),
    "no split 1": (
        put("split", lambda x: np.where(x == 1, 0, x)),
        "split: must have clips of split 1 (downstream train); came none.",
    ),
    "no split 2": (
        put("split", lambda x: x.clip(0, 1)),
        "split: must have clips of split 2 (downstream test); came none.",
    ),
    "label floats": (
        put("labels", lambda x: x + 0.5),
        f"labels: must be int [{N}]; came float64[{N}].",
    ),
    "label shape": (
        put("labels", lambda x: x[:-1]),
        f"labels: must be int [{N}]; came int32[{N - 1}].",
    ),
    "label below": (
        label("labels", -1),
        "labels: must be 0 to 4095 in splits 1 and 2; came -1. Hint: number the classes from 0.",
    ),
    "label above": (
        label("labels", 4096),
        "labels: must be 0 to 4095 in splits 1 and 2; came 4096. Hint: number the classes from 0.",
    ),
    "segment label": (
        label("seg_labels_video", -2),
        "seg_labels_video: must be -1 to 4095 in splits 1 and 2; came -2. "
        "Hint: number the classes from 0.",
    ),
    "segment label shape": (
        put("seg_labels_text", lambda x: x[:, 1:]),
        f"seg_labels_text: must be int [{N}, {T}]; came int64[{N}, {T - 1}].",
    ),
    "box": (
        put("video_box", lambda x: x[..., :3]),
        f"video_box: must be int [{N}, {T}, 4]; came int16[{N}, {T}, 3].",
    ),
    "one class": (
        put("labels", lambda x: np.zeros_like(x)),
        "labels: must show two classes or more in split 1; came only 0.",
    ),
    "pickled features": (
        put("audio", lambda x: x.astype(object)),
        "audio: cannot be read (Object arrays cannot be loaded when allow_pickle=False).",
    ),
    "pickled labels": (
        put("labels", lambda x: x.astype(object)),
        "labels: cannot be read (Object arrays cannot be loaded when allow_pickle=False).",
    ),
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
    message = f"no modality '{name}'. The file offers: audio, video, text."
    with pytest.raises(DataError, match=re.escape(message)):
        load_clips(clips_path, ["audio", name])


def test_a_modality_is_named_once(clips_path: Path) -> None:
    with pytest.raises(DataError, match="modalities: each name once; came audio audio"):
        load_clips(clips_path, ["audio", "audio"])


def test_a_file_without_modalities(tmp_path: Path, arrays: Arrays) -> None:
    path = write(tmp_path, {name: arrays[name] for name in ("labels", "split")})
    with pytest.raises(DataError, match="holds no modality"):
        load_clips(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.npz: no such file\. Hint: "):
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
