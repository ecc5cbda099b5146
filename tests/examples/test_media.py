"""From a folder of media files to a data set: what is in it, faults, and going on after a kill."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cmg_features
import cmg_pretrain
import numpy as np
import psutil
import pytest
import torch
from examples.conftest import before_call, interrupt
from media_files import beeps, captions, film
from support import ROOT

from cmg.clips import Clips
from cmg.data import load_clips
from cmg.errors import DataError
from cmg.media import extract as extraction
from cmg.media import loading
from cmg.media import partial as partials
from cmg.media.encoders import load_encoder
from cmg.media.extract import Report, Settings, extract
from cmg.media.folder import open_folder

T = 4
FAST = {"audio": "log-mel", "video": "patches", "text": "n-grams"}
FAST_ORDER = ("video", "audio", "text")  # of notes
SETTINGS = Settings(segments=T, seconds=4.0, encoders=FAST)
CLASSES = ("dog", "cat", "bird")
original = loading.decode
OPTIONS = ["--segments", "4", "--seconds", "4", *(f"--{m}={x}" for m, x in FAST.items())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine good clips of three classes, and one with each fault."""
    folder = tmp_path_factory.mktemp("media")
    clips = folder / "clips"
    rows = [("id", "label", "split")]
    for k in range(9):
        film(clips / f"good{k}.mp4", sound=beeps(4) * (k + 1) / 10)
        captions(folder, f"good{k}", [f"a {CLASSES[k % 3]} in clip {k}"])
        split = ("pretrain", "train", "test")[k // 3]
        rows.append((f"good{k}", CLASSES[k % 3], split))
    film(clips / "bad-short.mp4", 2, sound=beeps(2))
    film(clips / "bad-silent.mp4", sound=np.zeros(64_000, np.float32))
    film(clips / "bad-mute.mp4")
    content = (clips / "good0.mp4").read_bytes()
    (clips / "bad-cut.mp4").write_bytes(content[: len(content) // 2])
    (clips / "bad-text.mp4").write_text("not a video")
    with (folder / "clips.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """The data set of the folder, and the report."""
    output = tmp_path_factory.mktemp("store") / "store"
    return output, extract(open_folder(folder), output, SETTINGS, workers=0)


def contents(store: Path) -> dict[str, bytes]:
    return {x.name: x.read_bytes() for x in store.iterdir() if x.is_file()}


def test_the_data_set(store: tuple[Path, Report]) -> None:
    clips = load_clips(store[0])
    assert isinstance(clips, Clips)
    assert clips.modalities == ("audio", "video", "text")
    assert clips.encoders == FAST
    assert clips.class_names == ("bird", "cat", "dog")
    assert clips.ids == tuple(sorted(clips.ids))
    row = {name: k for k, name in enumerate(clips.ids)}
    good = torch.tensor([row[f"good{k}"] for k in range(9)])
    assert clips.split[good].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert clips.labels[good].tolist() == [-1, -1, -1, 2, 1, 0, 2, 1, 0]
    for name in clips.modalities:
        assert clips.valid(name, good).all()
        width = load_encoder(name, FAST[name]).width
        assert list(clips.features[name].shape) == [14, T, width]
        x = clips.read(name, good)
        assert x.dtype == torch.float16
        assert x.abs().sum() > 0
    assert clips.valid("video")[row["bad-short"]].tolist() == [True, True, False, False]
    assert clips.valid("audio")[row["bad-short"]].tolist() == [True, True, False, False]
    for name in ("bad-silent", "bad-mute", "bad-cut", "bad-text"):
        assert not clips.valid("audio")[row[name]].any()
        assert clips.valid("video")[row[name]].any() == (name in ("bad-silent", "bad-mute"))
        assert not clips.valid("text")[row[name]].any()


def test_features_are_those_of_the_encoder(folder: Path, store: tuple[Path, Report]) -> None:
    from cmg.media.decode import Cut, decode

    clips = load_clips(store[0])
    k = clips.ids.index("good4")
    source = open_folder(folder).sources[k]
    video = load_encoder("video", "patches")
    clip = decode(source, Cut(T, 4.0, video.frames, video.size, 16_000, True))
    expected = {
        "video": video(torch.from_numpy(clip.frames)),
        "audio": load_encoder("audio", "log-mel")(torch.from_numpy(clip.sound)[None])[0],
        "text": load_encoder("text", "n-grams")(clip.captions),
    }
    for name, x in expected.items():
        found = clips.read(name, torch.tensor([k]))[0]
        torch.testing.assert_close(found.float(), x, atol=2e-3, rtol=2e-3)


def test_problems_are_rows_of_a_file_and_counted(store: tuple[Path, Report]) -> None:
    output, report = store
    with (output / "problems.csv").open(newline="") as file:
        header, *rows = map(tuple, csv.reader(file))
    assert header == ("id", "modality", "problem")
    assert rows == report.problems
    assert ("bad-silent", "audio", "silent") in rows
    assert ("bad-mute", "audio", "no sound") in rows
    assert ("bad-short", "video", "shorter than the clip: picture in 2 of 4 segments") in rows
    assert {x for x, _, _ in rows} == {x for x in load_clips(output).ids if x.startswith("bad")}
    assert report.valid["audio"] == pytest.approx((9 * 4 + 2) / (14 * 4))
    assert "audio: no sound" in str(report)
    lines = str(report).splitlines()
    assert lines[-1].endswith("audio: shorter than the clip")
    assert "      2  video: cannot be decoded" in lines


def test_it_trains(store: tuple[Path, Report], tmp_path: Path) -> None:
    arguments = ["--data", str(store[0]), "--epochs", "1", "--output", str(tmp_path / "run")]
    assert cmg_pretrain.main(arguments) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["classification"]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "BATCH", 3)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(
    folder: Path, store: tuple[Path, Report], tmp_path: Path, workers: int
) -> None:
    extract(open_folder(folder), tmp_path / "store", SETTINGS, workers=workers)
    assert contents(tmp_path / "store") == contents(store[0])


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("spoil", ["nothing", "torn line", "next rows"])
def test_an_interrupted_extraction_continues_to_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    found, whole, output = open_folder(folder), tmp_path / "whole", tmp_path / "store"
    extract(found, whole, SETTINGS, workers=0)
    partial = tmp_path / "store.partial"
    with monkeypatch.context() as patch:
        patch.setattr(loading, "decode", before_call(8, interrupt, original))
        with pytest.raises(KeyboardInterrupt):
            extract(found, output, SETTINGS, workers=0)
    journal = partial / "journal.jsonl"
    assert len(journal.read_bytes().splitlines()) == 2
    assert not output.exists()
    if spoil == "torn line":
        with journal.open("ab") as file:
            file.write(b'[["bad-mu')
    if spoil == "next rows":  # the batch was being written when it was killed
        array = np.load(partial / "audio.npy", mmap_mode="r+")
        array[7:9] = 7
        array.flush()
    with pytest.raises(DataError, match=r"was interrupted\. Hint: --resume"):
        extract(found, output, SETTINGS, workers=0)
    decoded = []
    monkeypatch.setattr(loading, "decode", lambda s, cut: decoded.append(s.id) or original(s, cut))
    extract(found, output, SETTINGS, workers=0, resume=True)
    assert len(decoded) == 14 - 6
    assert contents(output) == contents(whole)
    assert not partial.exists()


def test_a_killed_process_continues_to_the_same_bytes(tmp_path: Path) -> None:
    for k in range(40):
        film(tmp_path / "in" / f"{k}.mp4", 1, sound=beeps(1) + 0.1)
    options = [str(tmp_path / "in"), *OPTIONS, "--segments", "1", "--seconds", "1", "--workers=1"]
    command = [sys.executable, "-c", STUCK, *options, "--output", str(tmp_path / "store")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    journal = tmp_path / "store.partial" / "journal.jsonl"
    try:
        for _ in range(600):
            if journal.exists() and journal.stat().st_size:
                break
            time.sleep(0.1)
    finally:
        workers = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert workers
    assert psutil.wait_procs(workers, timeout=30)[1] == []  # they end with it
    assert len(journal.read_bytes().splitlines()) == 1
    assert cmg_features.main([*options, "--output", str(tmp_path / "store"), "--resume"]) == 0
    assert cmg_features.main([*options, "--output", str(tmp_path / "whole")]) == 0
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


STUCK = """
import sys, time
import cmg_features
from cmg.media import loading, partial
decode, done = loading.decode, []
def decode_twenty(*arguments):
    done.append(arguments)
    time.sleep(600 * (len(done) > 20))
    return decode(*arguments)
loading.decode = decode_twenty
sys.exit(cmg_features.main(sys.argv[1:]))
"""


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda media, s: (media, Settings(T, 4.0, {**FAST, "audio": "speech-embedding"})),
            "encoders",
        ),
        (lambda media, s: (media, Settings(T, 3.0, FAST)), "seconds"),
        (lambda media, s: (media, Settings(2, 4.0, FAST)), "segments"),
        (lambda media, s: (film(media / "new.mp4").parent, s), "files"),
        (lambda media, s: (film(media / "clips" / "good1.mp4", 3).parents[1], s), "files"),
    ],
    ids="encoders seconds segments new-file changed-file".split(),
)
def test_what_was_begun_with_other_files_or_settings_is_not_continued(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path, Settings], tuple[Path, Settings]],
    message: str,
) -> None:
    media = shutil.copytree(folder, tmp_path / "media")
    with monkeypatch.context() as patch:
        patch.setattr(loading, "decode", before_call(5, interrupt, original))
        with pytest.raises(KeyboardInterrupt):
            extract(open_folder(media), tmp_path / "store", SETTINGS, workers=0)
    media, settings = change(media, SETTINGS)
    with pytest.raises(DataError, match=f"with other {message}. Hint: the same command"):
        extract(open_folder(media), tmp_path / "store", settings, workers=0, resume=True)


@pytest.mark.usefixtures("small_batches")
def test_a_full_disk_is_one_error_and_can_be_continued(
    folder: Path, store: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(
            partials.PartialStore, "_put", before_call(9, full, partials.PartialStore._put)
        )
        with pytest.raises(DataError, match=r"store\.partial: cannot be written .*No space left"):
            extract(open_folder(folder), tmp_path / "store", SETTINGS, workers=0)
    extract(open_folder(folder), tmp_path / "store", SETTINGS, workers=0, resume=True)
    for name in ("audio", "mask_audio", "video", "text"):
        assert np.array_equal(
            np.load(tmp_path / "store" / f"{name}.npy"), np.load(store[0] / f"{name}.npy")
        )


@pytest.mark.parametrize("how", ["ends", "is killed"])
def test_a_decoder_that_crashes_costs_its_clip_only(
    folder: Path,
    store: tuple[Path, Report],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    def crashes(source: object, cut: object) -> object:
        if source.id in ("good3", "good4"):
            if how == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(9)
        return original(source, cut)

    monkeypatch.setattr(loading, "decode", crashes)
    report = extract(open_folder(folder), tmp_path / "store", SETTINGS, workers=2)
    notes = [x for x in report.problems if x[2] == "the decoder crashed"]
    assert notes == [(f"good{k}", m, "the decoder crashed") for k in (3, 4) for m in FAST_ORDER]
    found, whole = load_clips(tmp_path / "store", labels="ignored"), load_clips(store[0])
    row = [whole.ids.index("good3"), whole.ids.index("good4")]
    others = torch.tensor([k for k in range(14) if k not in row])
    for name in FAST:
        assert not found.valid(name)[row].any()
        assert torch.equal(found.valid(name, others), whole.valid(name, others))
        assert torch.equal(found.read(name, others), whole.read(name, others))


def test_a_fault_of_the_code_in_a_worker_is_no_error_of_the_data(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(source: object, cut: object) -> object:
        raise RuntimeError("a fault")

    monkeypatch.setattr(loading, "decode", fails)
    with pytest.raises(RuntimeError, match="a fault"):
        extract(open_folder(folder), tmp_path / "store", SETTINGS, workers=1)


@pytest.mark.parametrize("spoil", ["short array", "other array", "journal", "manifest", "gone"])
@pytest.mark.usefixtures("small_batches")
def test_a_damaged_extraction_is_not_continued(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loading, "decode", before_call(5, interrupt, original))
        with pytest.raises(KeyboardInterrupt):
            extract(open_folder(folder), tmp_path / "store", SETTINGS, workers=0)
    partial = tmp_path / "store.partial"
    if spoil == "short array":
        os.truncate(partial / "video.npy", 1000)
    if spoil == "other array":
        np.save(partial / "audio.npy", np.zeros((14, T, 3), np.float16))
    if spoil == "journal":
        (partial / "journal.jsonl").write_text("[1e9, []]\n")
    if spoil == "manifest":
        (partial / "manifest.json").write_text("[]")
    if spoil == "gone":
        (partial / "mask_text.npy").unlink()
    with pytest.raises(DataError, match=r"store\.partial: holds an extraction .* Hint: "):
        extract(open_folder(folder), tmp_path / "store", SETTINGS, workers=0, resume=True)


def test_a_failure_at_the_end_can_be_continued(
    folder: Path, store: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(partials, "give_name", full)
        with pytest.raises(DataError, match="cannot be written"):
            extract(open_folder(folder), tmp_path / "store", SETTINGS, workers=0)
    extract(open_folder(folder), tmp_path / "store", SETTINGS, workers=0, resume=True)
    assert contents(tmp_path / "store") == contents(store[0])


@pytest.mark.parametrize(("segments", "seconds"), [(10, 1e9), (10**6, 10.0), (10, float("nan"))])
def test_settings_that_are_out_of_range(
    folder: Path, tmp_path: Path, segments: int, seconds: float
) -> None:
    with pytest.raises(DataError, match="a clip has at most 3600 s and 10000 segments; got"):
        extract(open_folder(folder), tmp_path / "store", Settings(segments, seconds, FAST))


def test_numbers_that_do_not_fit_are_not_valid(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd(torch.nn.Module):
        width, rate, frames, size = 3, 16_000, 0, 0

        def forward(self, sound: torch.Tensor) -> torch.Tensor:
            x = torch.ones(*sound.shape[:2], 3)
            x[0, 1, 2], x[1, 0, 0] = torch.nan, 1e6
            return x

    monkeypatch.setattr(extraction, "load_encoder", lambda *_: Odd())
    settings = Settings(T, 4.0, {"audio": "odd"})
    report = extract(open_folder(folder), tmp_path / "store", settings, workers=0)
    odd = [x for x in report.problems if "NaN, Inf" in x[2]]
    assert len(odd) == 2
    clips = np.load(tmp_path / "store" / "audio.npy")
    assert np.isfinite(clips).all()
    assert np.load(tmp_path / "store" / "mask_audio.npy").sum() == 9 * 4 + 2 - 2


def test_a_modality_without_any_valid_segment_is_left_out(tmp_path: Path) -> None:
    for k in range(2):
        film(tmp_path / "media" / f"{k}.mp4")
        captions(tmp_path / "media", f"{k}", ["a dog"])
    report = extract(open_folder(tmp_path / "media"), tmp_path / "store", SETTINGS, workers=0)
    assert report.valid["audio"] == 0
    assert not (tmp_path / "store" / "audio.npy").exists()
    assert json.loads((tmp_path / "store" / "meta.json").read_text())["modalities"] == [
        "video", "text",
    ]  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cmg_features.main([*map(str, arguments)]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_the_command_line_and_what_it_refuses(
    folder: Path, store: tuple[Path, Report], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "store"
    arguments = [str(folder), *OPTIONS, "--output", str(output), "--workers", "1"]
    assert cmg_features.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "14 clips, 3 classes" in printed
    assert "time: decoding" in printed
    assert contents(output) == contents(store[0])
    assert "exists and is not empty" in refused(capsys, *arguments)
    other = ("--output", tmp_path / "other")
    assert "must be of audio video text; got 'sound'" in refused(
        capsys, folder, *other, "--modalities", "sound"
    )
    assert "--audio wordllama: is an encoder of text" in refused(
        capsys, folder, *other, "--audio", "wordllama"
    )
    empty = tmp_path / "broken"
    empty.mkdir()
    (empty / "a.mp4").write_text("x")
    assert "nothing could be decoded (a: cannot be decoded:" in refused(capsys, empty, *other)
    (tmp_path / "dogs" / "dog").mkdir(parents=True)
    (tmp_path / "dogs" / "dog" / "1.mp4").write_text("x")  # not below clips/
    assert "has no media files. Hint: put videos in" in refused(capsys, tmp_path / "dogs", *other)
    assert "no clip has a file for text" in refused(
        capsys, empty, "--output", tmp_path / "third", "--modalities", "text"
    )


def test_labels_without_a_test_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film(tmp_path / "media" / "a.mp4", 1)
    (tmp_path / "media" / "clips.csv").write_text("id,label\na,dog\n")
    options = ["--output", str(tmp_path / "store"), *OPTIONS, "--workers", "0"]
    assert cmg_features.main([str(tmp_path / "media"), *options]) == 0
    assert "warning: training takes clips of train and of test" in capsys.readouterr().err


def test_an_interrupted_command_says_how_to_go_on(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(loading, "decode", before_call(2, interrupt, original))
    arguments = [str(folder), *OPTIONS, "--output", str(tmp_path / "store"), "--workers", "0"]
    assert cmg_features.main(arguments) == 130
    assert "--resume continues" in capsys.readouterr().err


def test_a_missing_package_is_named(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert cmg_features.main([str(folder), *OPTIONS, "--output", str(tmp_path / "store")]) == 2
    printed = capsys.readouterr().err
    assert printed.endswith(": av is not installed. Hint: pip install 'mmvq[media]'\n")
