"""The built-in clips as media files: what is seen, heard and read in them, and when."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import av
import cmg_media
import numpy as np
import pytest

from cmg import digits
from cmg.digits import media, sentences, speech
from cmg.digits.style import Style
from cmg.digits.things import DIGITS
from cmg.errors import DataError

SEED, COUNTS = 5, (1, 2, 1)
PLACES = [(0, 0), (1, 0), (1, 1), (2, 0)]
NAMES = ["pretrain-0000", "train-0000", "train-0001", "test-0000"]
each_clip = pytest.mark.parametrize("place", PLACES, ids=NAMES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media") / "new" / "files"
    media.write_media(path, SEED, clips=COUNTS, workers=1)
    return path


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    return digits.render(SEED, clips=COUNTS)


def video_file(folder: Path, place: tuple[int, int]) -> Path:
    return folder / "clips" / f"{media.clip_id(*place)}.mp4"


def watch(path: Path) -> tuple[np.ndarray, list[float]]:
    """The frames of a video [T * FPS, 224, 224], and their times in seconds."""
    with av.open(path) as file:
        frames = list(file.decode(video=0))
    pictures = np.stack([frame.to_ndarray(format="gray") for frame in frames])
    return pictures, [float(frame.time) for frame in frames]


def listen(path: Path) -> np.ndarray:
    """The sound of a video: [T, 16000], by the times of its blocks."""
    with av.open(path) as file:
        blocks = list(file.decode(audio=0))
    sound = np.zeros(11 * speech.RATE, dtype=np.float32)
    for block in blocks:
        assert block.sample_rate == speech.RATE
        start = round(block.time * speech.RATE)
        sound[start : start + block.samples] = block.to_ndarray()[0]
    return sound.reshape(11, -1)[:10]


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_layout(folder: Path) -> None:
    captions, clips = ([f"{kind}/{x}" for x in NAMES] for kind in ("captions", "clips"))
    expected = {"clips.csv", *(f"{x}.txt" for x in captions), *(f"{x}.mp4" for x in clips)}
    assert set(files(folder)) == expected
    assert [path.name for path in folder.parent.iterdir()] == ["files"]


def test_table(folder: Path, data: dict[str, np.ndarray]) -> None:
    with (folder / "clips.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    words = [DIGITS.names[label] for label in data["labels"]]
    assert rows == [
        {"id": name, "label": word if split else "", "split": media.SPLITS[split]}
        for name, word, split in zip(NAMES, words, data["split"], strict=True)
    ]


def test_captions(folder: Path, data: dict[str, np.ndarray]) -> None:
    for name, features in zip(NAMES, data["text"], strict=True):
        lines = (folder / "captions" / f"{name}.txt").read_text().splitlines()
        assert len(lines) == 10
        assert np.array_equal(sentences.read(lines).astype(np.float32), features)


@each_clip
def test_streams(folder: Path, place: tuple[int, int]) -> None:
    with av.open(video_file(folder, place)) as file:
        (video,), (audio,) = file.streams.video, file.streams.audio
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        assert (video.width, video.height, video.average_rate) == (224, 224, 8)
        assert (audio.rate, audio.layout.name) == (16_000, "mono")
        for stream in (video, audio):
            assert stream.start_time == 0
            assert stream.duration * stream.time_base == 10


@each_clip
def test_frames_are_in_their_seconds(folder: Path, place: tuple[int, int]) -> None:
    """The middle of each is nearer to the picture of its second than to all others."""
    frames, times = watch(video_file(folder, place))
    assert times == [n / 8 for n in range(80)]
    small = frames.reshape(80, 56, 4, 56, 4).mean((2, 4))
    stills = digits.render_clip(SEED, *place).frames.clip(0, 1)

    def best(dy: int, dx: int) -> np.ndarray:
        return correlation(small[:, 1:-1, 1:-1], stills[:, 1 + dy : 55 + dy, 1 + dx : 55 + dx])

    shifted = np.stack([best(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)])
    found = shifted.max(0)  # [80, 10]
    own = found[np.arange(80), np.arange(80) // 8]
    assert (found.argmax(1) == np.arange(80) // 8).all()
    assert own.min() > 0.5
    assert own.mean() > 0.85


def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation of pictures [M, ...] with pictures [N, ...]: [M, N]."""
    x, y = (z.reshape(len(z), -1) - z.mean((1, 2))[:, None] for z in (x, y))
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    return x @ y.T


@each_clip
def test_pictures_survive_the_codec(folder: Path, place: tuple[int, int]) -> None:
    frames, _ = watch(video_file(folder, place))
    clip = digits.render_clip(SEED, *place)
    filmed = media.film(clip.frames, digits.streams(SEED, *place)[-1])
    error = frames - filmed.astype(np.float32)
    assert abs(error.mean()) < 0.5
    assert error.std() < 6


@each_clip
def test_sound_is_in_its_place(folder: Path, place: tuple[int, int]) -> None:
    sound = listen(video_file(folder, place))
    written = media.LOUDNESS * digits.render_clip(SEED, *place).sound
    lags = np.fft.irfft(np.fft.rfft(sound.ravel()) * np.fft.rfft(written.ravel()).conj())
    assert lags.argmax() == 0
    energy, expected = ((x**2).sum(1) for x in (sound, written))
    np.testing.assert_allclose(energy, expected, rtol=0.3)
    assert np.abs(sound).max() < 1


def test_words_are_in_their_seconds(tmp_path: Path) -> None:
    """Without the noise of a room, all but a trace of the energy is where words are."""
    spoken = np.array([-1, 3, -1, -1, 7, -1, 8, 1, -1, -1])
    voice, rng = speech.voices(0, 0)[0], np.random.default_rng(0)
    words = speech._speak(spoken[spoken >= 0], voice, rng, DIGITS)
    sound = np.zeros((10, speech.RATE), np.float32)
    sound[spoken >= 0, : words.shape[1]] = words
    media._encode(tmp_path / "x.mp4", np.zeros((80, 224, 224), np.uint8), media.LOUDNESS * sound)
    energy = (listen(tmp_path / "x.mp4") ** 2).sum(1)
    assert energy[spoken < 0].sum() < 1e-3 * energy[spoken >= 0].min()


def test_the_camera_moves_and_the_digit_stays_in_the_picture() -> None:
    stills = np.zeros((3, 56, 56), np.float32)
    stills[:, 20:30, 24:28] = 1
    for seed in range(20):
        filmed = media.film(stills, np.random.default_rng(seed))
        assert filmed.shape == (24, 224, 224)
        weight = filmed / filmed.sum((1, 2), keepdims=True)
        row = (weight.sum(2) * np.arange(224)).sum(1)
        column = (weight.sum(1) * np.arange(224)).sum(1)
        for centre, path in ((99.5, row), (103.5, column)):
            assert np.abs(path - centre).max() <= 4 + 1e-6
            assert np.ptp(path) >= 4
            assert np.abs(np.diff(path)).max() <= 4


def test_a_picture_that_does_not_move_is_enlarged_without_a_shift() -> None:
    ramp = np.broadcast_to(np.arange(6, dtype=np.float32), (1, 6, 6))
    large = media._enlarge(ramp)
    assert large.shape == (1, 24, 24)
    inner = (np.arange(24) + 0.5) / 4 - 0.5
    np.testing.assert_allclose(large[0, 0], inner.clip(0, 5), atol=1e-6)
    np.testing.assert_allclose(media._enlarge(ramp.transpose(0, 2, 1)), large.transpose(0, 2, 1))


def test_the_same_clips_from_other_processes(folder: Path, tmp_path: Path) -> None:
    """And a clip does not depend on the number of clips. (Encoders promise no equal bytes.)"""
    (tmp_path / "files").mkdir()  # an empty folder is replaced
    media.write_media(tmp_path / "files", SEED, clips=(1, 1, 0), workers=2)
    some, all_files = files(tmp_path / "files"), files(folder)
    table = some.pop("clips.csv").splitlines()
    assert set(table) <= set(all_files["clips.csv"].splitlines())
    assert len(some) == 4
    for name, content in some.items():
        if name.endswith(".txt"):
            assert content == all_files[name]
        else:
            (ours, _), (theirs, _) = watch(tmp_path / "files" / name), watch(folder / name)
            assert np.abs(ours.astype(int) - theirs).mean() < 0.1  # of 255
            ours, theirs = listen(tmp_path / "files" / name), listen(folder / name)
            assert np.abs(ours - theirs).mean() < 1e-3


def test_another_seed_and_style_are_other_clips(folder: Path, tmp_path: Path) -> None:
    for name, arguments in {
        "seed": {"seed": 6},
        "style": {"style": Style("slow", pace=(0.7, 0.8))},
    }.items():
        given = {"seed": SEED, "clips": (1, 0, 0), "workers": 1} | arguments
        media.write_media(tmp_path / name, **given)
        some, all_files = files(tmp_path / name), files(folder)
        assert len(some) == 3
        for path in some.keys() - {"clips.csv"}:
            assert some[path] != all_files[path]


def test_without_h264(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, np.ndarray]
) -> None:
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    media.write_media(tmp_path / "files", SEED, clips=(1, 0, 0), workers=1)
    path = video_file(tmp_path / "files", (0, 0))
    with av.open(path) as file:
        assert file.streams.video[0].codec_context.name == "mpeg4"
    frames, times = watch(path)
    assert times == [n / 8 for n in range(80)]
    filmed = media.film(
        digits.render_clip(SEED, 0, 0).frames, digits.streams(SEED, 0, 0)[-1]
    ).astype(np.float32)
    assert (frames - filmed).std() < 6
    assert path.stat().st_size < 250_000


@pytest.mark.parametrize("made", ["file", "folder", "link"])
def test_nothing_is_replaced(tmp_path: Path, made: str) -> None:
    path = tmp_path / "files"
    if made == "folder":
        path.mkdir()
        (path / "precious").touch()
    elif made == "file":
        path.touch()
    else:
        path.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"files: exists and is not empty.*another folder"):
        media.write_media(path, clips=(1, 0, 0), workers=1)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(media, "_encode", fail)
    code = cmg_media.main([str(tmp_path / "files"), "--clips", "1", "0", "0", "--workers", "1"])
    message = capsys.readouterr().err
    if isinstance(error, OSError):
        assert code == 2
        assert message.endswith("cmg_media: pretrain-0000: cannot be written (disk full).\n")
    else:
        assert code == 130
        assert message.endswith("cmg_media: stopped. Nothing was written.\n")
    assert list(tmp_path.iterdir()) == []


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "files"
    arguments = [str(path), "--seed", "5", "--clips", "0", "0", "1", "--workers", "1"]
    assert cmg_media.main(arguments) == 0
    assert capsys.readouterr().out == f"written to {path}\n"
    assert files(path)["clips/test-0000.mp4"] == files(folder)["clips/test-0000.mp4"]


def test_without_pyav(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert cmg_media.main([str(tmp_path / "files")]) == 2
    assert "pip install 'mmvq[media]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
