"""The folder of .npy files: what is written is what is read, batch by batch, and refused."""

from __future__ import annotations

import gc
import json
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cmg_diagnose
import cmg_features
import cmg_pretrain
import numpy as np
import pytest
import released_files as released
import torch
from examples.conftest import CLASSES, Arrays, N, T, make_arrays
from support import peak_growth

from cmg.batches import Batches, Loader, Order
from cmg.clips import Clips
from cmg.data import load_clips
from cmg.errors import DataError
from cmg.files import temporary_folder
from cmg.report import description
from cmg.standardize import Standardizer
from cmg.store import write_store

SMALL = 1e-6  # GiB in memory: less than any data set


def write(folder: Path, arrays: Arrays, meta: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    if meta is not None:
        (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def rows_of(clips: Clips) -> torch.Tensor:
    return torch.arange(len(clips.split))


@pytest.fixture
def masked(arrays: Arrays) -> Arrays:
    """Clips of which some have no audio, others fewer segments of video; NaN where not valid."""
    rng = np.random.default_rng(1)
    audio = np.ones((N, T), bool)
    audio[rng.random(N) < 0.3] = False
    video = np.arange(T) < rng.integers(1, T + 1, N)[:, None]
    arrays["audio"][~audio] = np.nan
    arrays["video"][~video] = np.inf
    return arrays | {"mask_audio": audio, "mask_video": video}


def test_a_folder_gives_the_clips_of_the_npz(tmp_path: Path, arrays: Arrays, clips: Clips) -> None:
    folder = write(tmp_path / "store", arrays, {"modalities": ["audio", "video", "text"]})
    got = load_clips(folder)
    assert got.modalities == clips.modalities
    rows = torch.tensor([3, 110, 4])
    for name in clips.modalities:
        assert not isinstance(got.features[name], torch.Tensor)
        assert torch.equal(got.read(name, rows), clips.read(name, rows))
        assert torch.equal(got.segment_labels[name], clips.segment_labels[name])
    assert torch.equal(got.labels, clips.labels)
    one, two = Standardizer.fit(got), Standardizer.fit(clips)
    assert one.fingerprint() == two.fingerprint()
    a, b = Batches(got, one)[rows], Batches(clips, two)[rows]
    assert all(torch.equal(a.features[name], b.features[name]) for name in clips.modalities)
    assert a.masks is b.masks is None


def test_streamed_batches_are_those_in_memory(tmp_path: Path, masked: Arrays) -> None:
    clips = load_clips(write(tmp_path / "store", masked))
    standardizer = Standardizer.fit(clips)
    memory, stream = Batches(clips, standardizer), Batches(clips, standardizer, SMALL)
    assert (memory.streamed, stream.streamed) == (False, True)
    assert memory.shapes == stream.shapes == {"audio": (1, 12), "text": (1, 9), "video": (4, 6)}
    rows, kept, cpu = torch.tensor([5, 100, 7]), torch.tensor([0, 2]), torch.device("cpu")
    a, b = (x.ready(x[rows], cpu, kept) for x in (memory, stream))
    assert a.masks is not None
    assert b.masks is not None
    for name in memory.shapes:
        assert torch.equal(a.masks[name], b.masks[name])
        torch.testing.assert_close(a.features[name], b.features[name], atol=1e-3, rtol=1e-3)
        assert (a.features[name][~a.masks[name]] == 0).all()


def test_a_run_from_a_folder_is_that_from_the_npz(
    tmp_path: Path, clips_path: Path, arrays: Arrays
) -> None:
    """In memory to the bit; streamed with two workers, up to the rounding of float16."""
    folder = write(tmp_path / "store", arrays, {"modalities": ["audio", "video", "text"]})
    told = {}
    for name, data, more in (
        ("npz", clips_path, []),
        ("folder", folder, []),
        ("streamed", folder, ["--in-memory", str(SMALL), "--workers", "2"]),
    ):
        out = tmp_path / name
        arguments = ["--data", str(data), "--epochs", "3", "--output", str(out), *more]
        assert cmg_pretrain.main(arguments) == 0
        told[name] = json.loads((out / "metrics.json").read_text())
        for key in ("seconds", "dataset"):
            del told[name][key]
    assert told["npz"] == told["folder"]
    one, two = (told[x]["classification"]["audio->video"] for x in ("npz", "streamed"))
    assert one["accuracy"] == pytest.approx(two["accuracy"], abs=0.1)
    assert told["npz"]["codebook"]["size"] == told["streamed"]["codebook"]["size"]


def test_masks_reach_training_evaluation_and_figures(tmp_path: Path, masked: Arrays) -> None:
    folder = write(tmp_path / "store", masked)
    out = tmp_path / "out"
    assert cmg_pretrain.main(["--data", str(folder), "--epochs", "8", "--output", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["classification"]["text->video"]["accuracy"] > 0.6
    clips = load_clips(folder)
    test = clips.rows(2)
    shown = clips.labels[test][clips.valid("audio", test).any(1)]
    chance = shown.bincount().max().item() / len(shown)  # of the clips that have audio
    assert metrics["classification"]["text->audio"]["chance"] == pytest.approx(chance)
    assert (out / "codes.png").is_file()


def test_what_is_not_valid_has_no_influence(tmp_path: Path, masked: Arrays) -> None:
    other = {name: array.copy() for name, array in masked.items()}
    other["audio"][~masked["mask_audio"]] = 1e4
    other["seg_labels_video"][~masked["mask_video"]] = 0
    scores = []
    for i, arrays in enumerate((masked, other)):
        folder, out = write(tmp_path / f"{i}", arrays), tmp_path / f"out{i}"
        arguments = ["--data", str(folder), "--epochs", "2", "--output", str(out)]
        assert cmg_pretrain.main(arguments) == 0
        scores.append(json.loads((out / "metrics.json").read_text()))
        for key in ("seconds", "dataset"):
            del scores[-1][key]
    assert scores[0] == scores[1]


def test_the_standardizer_is_stored_and_follows_the_files(tmp_path: Path, arrays: Arrays) -> None:
    folder = write(tmp_path / "store", arrays)
    clips = load_clips(folder)
    first = Standardizer.of(clips)
    assert first.fingerprint() == Standardizer.fit(clips).fingerprint()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Standardizer, "fit", None)  # not measured again
        again = Standardizer.of(load_clips(folder))
    assert again.fingerprint() == first.fingerprint()
    arrays["audio"] += 1
    np.save(folder / "audio.npy", arrays["audio"])
    changed = Standardizer.of(load_clips(folder))
    assert torch.equal(changed.mean["video"], first.mean["video"])
    torch.testing.assert_close(changed.mean["audio"], first.mean["audio"] + 1)


def test_standardised_features_are_stored_once(tmp_path: Path, masked: Arrays) -> None:
    folder = write(tmp_path / "store", masked)

    def stored() -> dict[str, int]:
        return {x.name: x.stat().st_mtime_ns for x in folder.glob("standardizer/*/features-*")}

    def batches() -> Batches:
        clips = load_clips(folder)
        return Batches(clips, Standardizer.of(clips), SMALL)

    first = batches()[torch.arange(9)]
    before = stored()
    assert len(before) == 3
    assert torch.equal(batches()[torch.arange(9)].features["audio"], first.features["audio"])
    assert stored() == before
    np.save(folder / "mask_audio.npy", np.ones((N, T), bool))
    np.save(folder / "audio.npy", np.nan_to_num(masked["audio"]) + 1)
    assert torch.equal(batches()[torch.arange(9)].features["video"], first.features["video"])
    assert len(stored()) == 3
    assert len(before.keys() & stored()) == 2


def test_another_run_leaves_the_features_of_a_running_one(tmp_path: Path, arrays: Arrays) -> None:
    clips = load_clips(write(tmp_path / "store", arrays))
    one, other = Standardizer.fit(clips), Standardizer.fit(clips, width=3)
    running = Batches(clips, one, SMALL)
    before = running[torch.arange(5)]
    assert Batches(clips, other, SMALL).shapes["audio"] == (1, 3)
    assert torch.equal(running[torch.arange(5)].features["audio"], before.features["audio"])


def test_data_that_are_in_no_folder_are_streamed_from_a_temporary_one(
    tmp_path: Path, clips: Clips, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMVQ_CACHE", str(tmp_path))
    standardizer = Standardizer.fit(clips)
    batches = Batches(clips, standardizer, SMALL)
    again = pickle.loads(pickle.dumps(batches))  # as for the workers of some platforms
    expected = Batches(clips, standardizer)[torch.arange(9)].features["video"]
    for x in (batches, again):
        found = x[torch.arange(9)].features["video"].float()
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    del again, x
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 3  # a folder for each modality
    del batches
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_written_whole_or_not_at_all(
    tmp_path: Path, clips: Clips, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_store(tmp_path / "store", replace(clips, class_names=("a", "b", "c")))
    back = load_clips(tmp_path / "store")
    assert back.modalities == clips.modalities
    assert back.class_names == ("a", "b", "c")
    for name in clips.modalities:
        x = clips.read(name, rows_of(clips))
        assert torch.equal(back.read(name, rows_of(back)), x.half())
    assert torch.equal(back.labels, clips.labels)
    assert back.video_box is not None
    with pytest.raises(DataError, match="store: exists and is not empty"):
        write_store(tmp_path / "store", clips)
    huge = {name: x.float() * 1e6 for name, x in clips.features.items()}  # type: ignore[union-attr]
    with pytest.raises(DataError, match="audio in float16: must be finite"):
        write_store(tmp_path / "other", clips.with_features(huge))
    assert [x.name for x in tmp_path.iterdir()] == ["store"]


def test_the_first_run_on_a_folder_and_the_next_are_the_same(
    tmp_path: Path, arrays: Arrays
) -> None:
    """The standardizer is measured, then loaded."""
    folder, models = write(tmp_path / "store", arrays), []
    for out in (tmp_path / "a", tmp_path / "b"):
        assert (
            cmg_pretrain.main(["--data", str(folder), "--epochs", "2", "--output", str(out)]) == 0
        )
        models.append((out / "model.safetensors").read_bytes())
    assert models[0] == models[1]


@pytest.mark.parametrize("name", ["../up", "/tmp/elsewhere", "a\\b", "a\nb", "", "training"])
def test_names_that_are_paths_or_taken_are_refused(
    tmp_path: Path, arrays: Arrays, name: str
) -> None:
    np.savez(tmp_path / "odd.npz", **arrays, **{name: arrays["audio"]})
    with pytest.raises(DataError, match="cannot name a modality"):
        load_clips(tmp_path / "odd.npz")


def test_features_too_small_for_float16_are_refused(tmp_path: Path, clips: Clips) -> None:
    tiny = {name: x.float() * 1e-9 for name, x in clips.features.items()}  # type: ignore[union-attr]
    with pytest.raises(DataError, match="audio: too small for float16"):
        write_store(tmp_path / "store", clips.with_features(tiny))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path: Path, clips: Clips) -> None:
    left, mine = tmp_path / ".store.0123456789abcdef.partial", tmp_path / ".store.backup"
    for folder in (left, mine):
        folder.mkdir()
        (folder / "audio.npy").write_bytes(b"half")
    held, remove = temporary_folder(tmp_path, "store")  # of one that runs
    write_store(tmp_path / "store", clips)
    assert {x.name for x in tmp_path.iterdir()} == {"store", held.name, mine.name}
    remove()
    assert {x.name for x in tmp_path.iterdir()} == {"store", mine.name}


def test_a_read_only_folder_keeps_its_standardizer_in_the_cache(
    tmp_path: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "store", arrays)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setenv("MMVQ_CACHE", str(tmp_path / "cache"))
    assert Standardizer.of(load_clips(folder)).mean
    assert list((tmp_path / "cache").glob("standardizer-*/audio/model.safetensors"))


def test_files_that_are_no_arrays_are_left_alone(tmp_path: Path, arrays: Arrays) -> None:
    folder = write(tmp_path / "store", arrays)
    (folder / "scratch.npy").write_bytes(b"")
    assert load_clips(folder).unused == {"scratch": "(not an array)"}


def test_cca_refuses_masks_before_training(
    tmp_path: Path, masked: Arrays, refused: Callable[..., str]
) -> None:
    folder, out = write(tmp_path / "store", masked), tmp_path / "out"
    line = refused("--data", folder, "--reference", "cca", "--output", out)
    assert "takes clips without masks; got masks of audio, video" in line
    assert not out.exists()


def test_a_run_with_masks_can_be_taken_apart(
    tmp_path: Path, masked: Arrays, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = write(tmp_path / "store", masked), tmp_path / "out"
    run = ["--data", str(folder), "--epochs", "4", "--output", str(out)]
    options = ["--precision", "bf16", "--workers", "1"]
    for _ in range(2):  # a worker does not hold the folder of a run that has ended
        assert cmg_pretrain.main([*run, *options, "--in-memory", "0"]) == 0
    capsys.readouterr()
    assert cmg_diagnose.main([str(out), "--data", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["segments"]["text->video"]["raw"] > 0.8


def test_the_authors_files_are_converted_once(tmp_path: Path) -> None:
    released.vggsound_avel(tmp_path / "vgg", clips=36)
    data = f"vggsound-avel:{tmp_path / 'vgg'}"
    assert cmg_features.main([data, "--output", str(tmp_path / "store")]) == 0
    clips = load_clips(tmp_path / "store")
    assert {name: x.shape for name, x in clips.features.items()} == {
        "audio": (36, 10, 128),
        "video": (36, 10, 7, 7, 512),
    }
    assert clips.class_names == released.CLASSES
    assert clips.ids[0] == "video000000"
    arguments = ["--data", str(tmp_path / "store"), "--epochs", "1", "--in-memory", str(SMALL)]
    assert cmg_pretrain.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert cmg_features.main([data, "--output", str(tmp_path / "store")]) == 2


def test_memory_does_not_grow_with_the_number_of_clips(tmp_path: Path) -> None:
    """Half a gigabyte of video, sparse but for every 50th clip, is read within 300 MiB."""
    folder, many = tmp_path / "store", 1000
    split = np.repeat([0, 1, 2], [900, 50, 50])
    labels = np.arange(many) % 3
    write(folder, {"split": split, "labels": labels, "audio": np.ones((many, 10, 4), np.float32)})
    shape = (many, 10, 7, 7, 512)
    video = np.lib.format.open_memmap(folder / "video.npy", "w+", np.float16, shape)
    video[::50] = np.random.default_rng(0).standard_normal(shape[1:])
    del video
    setup = "import os, sys; os.environ['TQDM_DISABLE'] = '1'\n"
    setup += "import sys; sys.path.insert(0, 'examples'); import torch\n"
    setup += "from cmg.batches import Batches; from cmg.data import load_clips\n"
    setup += "from cmg.standardize import Standardizer\nimport sklearn"
    call = f"clips = load_clips({str(folder)!r}); s = Standardizer.of(clips)\n"
    call += "for b in Batches(clips, s, 1e-6)(torch.arange(1000), torch.device('cpu'), 32): pass"
    assert peak_growth(setup, call) < 300


ONE = np.ones((N, T), bool)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "mask type": ({"mask_audio": ONE.astype(int)}, f"mask_audio.npy: must be bool [{N}, {T}]"),
    "mask shape": ({"mask_audio": ONE[:, 1:]}, f"mask_audio.npy: must be bool [{N}, {T}]"),
    "never there": ({"mask_text": ~ONE}, "mask_text.npy: must have a valid segment in split 0"),
    "no test": (
        {"mask_text": np.repeat(np.arange(N) < 100, T).reshape(N, T)},
        "mask_text.npy: must have a valid segment in split 2 (downstream test)",
    ),
    "mask of nothing": ({"mask_smell": ONE}, "no modality 'smell', though the file has mask_smell"),
    "ids type": ({"ids": np.arange(N)}, f"ids.npy: must be text [{N}]"),
    "ids twice": ({"ids": np.array(["a"] * N)}, f"ids.npy: must name each clip once; got {N - 1}"),
    "object modality": ({"audio": np.ones((N, T, 2), object)}, "audio.npy: cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays_are_named(tmp_path: Path, arrays: Arrays, case: str) -> None:
    changed, message = BAD[case]
    folder = write(tmp_path / "store", arrays | changed)
    with pytest.raises(DataError, match=re.escape(message)) as error:
        load_clips(folder)
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ("[]", "must be a JSON object"),
        ("{", "must be a JSON object"),
        ('{"modalities": "audio"}', "must be a JSON object"),
        ('{"modalities": ["audio", 3]}', "must be a JSON object"),
        ('{"version": 2}', "is of version 2; this release reads up to 1"),
        ('{"modalities": ["audio", "smell"]}', "no modality 'smell', though meta.json has it"),
        ('{"class_names": ["a"]}', "class_names has 1 names; the labels go up to 2"),
        ("[" * 100_000, "must be a JSON object"),
    ],
)
def test_a_bad_meta_json_is_named(tmp_path: Path, arrays: Arrays, meta: str, message: str) -> None:
    folder = write(tmp_path / "store", arrays)
    (folder / "meta.json").write_text(meta)
    with pytest.raises(DataError, match=re.escape(message)):
        load_clips(folder)


def test_nan_in_a_streamed_clip_is_named(tmp_path: Path, arrays: Arrays) -> None:
    arrays["video"][77, 1, 0, 1, 2] = np.nan
    clips = load_clips(write(tmp_path / "store", arrays))
    with pytest.raises(DataError, match="video: must be finite; got NaN or Inf in clip 77"):
        clips.read("video", torch.tensor([3, 77]))


def test_nan_in_a_clip_is_named_before_training(
    tmp_path: Path, arrays: Arrays, refused: Callable[..., str]
) -> None:
    arrays["video"][115] = np.nan  # of split 2, which the standardizer does not see
    folder = write(tmp_path / "store", arrays)
    line = refused("--data", folder, "--in-memory", SMALL, "--output", tmp_path / "out")
    assert line.endswith("video: must be finite; got NaN or Inf in clip 115.")


class Damaged:
    """Features of which some clips cannot be read."""

    shape = (20, 3, 4)

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        if 13 in rows:
            raise DataError("clip 13 cannot be read.")
        return torch.zeros(len(rows), 3, 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_is_that_of_the_data(workers: int) -> None:
    batches = Batches(Clips.of({"audio": Damaged()}))
    loader = Loader(batches, Order(torch.arange(20), 4), workers, torch.device("cpu"))
    seen = []
    with pytest.raises(DataError, match=r"^clip 13 cannot be read\.$"):
        seen.extend(loader)
    assert len(seen) == 3


def test_a_file_cut_short_or_changed_is_named(tmp_path: Path, arrays: Arrays) -> None:
    folder = write(tmp_path / "store", arrays)
    clips = load_clips(folder)
    np.save(folder / "audio.npy", arrays["audio"][:, :, :5])
    with pytest.raises(DataError, match=r"audio\.npy: has changed"):
        clips.read("audio", torch.tensor([0]))
    content = (folder / "video.npy").read_bytes()
    (folder / "video.npy").write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"video\.npy: cannot be read"):
        load_clips(folder)


def test_what_the_data_were_taken_as(tmp_path: Path, masked: Arrays) -> None:
    masked |= {"rate": np.array(16.0), "flow": np.ones((N, T), np.float32)}
    meta = {"encoders": {"video": "clip"}, "class_names": ["cat", "dog", "owl"]}
    clips = load_clips(write(tmp_path / "store", masked, meta))
    text = description("mine", clips)
    lost = int((~masked["mask_audio"].any(1)).sum())
    assert f"mine: {N} clips of {T} segments" in text
    assert f"{lost} clips without it" in text
    assert "video: 2 x 2 x 6 per segment, features of clip, labels of segments" in text
    assert f"classes: {CLASSES} (cat, dog, owl)" in text
    assert "pre-train 60, downstream train 40, downstream test 20, validation 0" in text
    assert f"not used: flow float32[{N}, {T}], rate float64[]" in text


def test_validation_clips_are_those_of_split_3(tmp_path: Path) -> None:
    arrays = make_arrays()
    assert torch.equal(
        load_clips(write(tmp_path / "a", arrays)).validation_rows(), torch.arange(60, 100)
    )
    arrays["split"][90:100] = 3
    clips = load_clips(write(tmp_path / "b", arrays))
    assert torch.equal(clips.validation_rows(), torch.arange(90, 100))
    assert torch.equal(clips.rows(1), torch.arange(60, 90))
