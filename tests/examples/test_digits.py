"""The built-in data set: determinism, shapes, disjoint splits, plots, boxes and the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from cmg import digits
from cmg.digits import clips, pictures, sentences, speech, style
from cmg.digits.things import DIGITS, NUMBERS

COUNTS = (3, 2, 2)


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    return digits.render(5, clips=COUNTS)


@pytest.fixture(scope="module")
def plots() -> list[clips.Clip]:
    return [clips.compose(np.random.default_rng(seed)) for seed in range(400)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `load` render three clips instead of fourteen hundred."""
    render = digits.render
    monkeypatch.setattr(digits, "render", lambda seed: render(seed, clips=(1, 1, 1)))


def equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(
        np.array_equal(left[name], right[name]) for name in left
    )


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def test_arrays(data: dict[str, np.ndarray]) -> None:
    N = sum(COUNTS)
    assert {name: (array.dtype.name, array.shape) for name, array in data.items()} == {
        "audio": ("float32", (N, 10, 128)),
        "video": ("float16", (N, 10, 7, 7, 512)),
        "text": ("float32", (N, 10, 768)),
        "labels": ("int64", (N,)),
        "seg_labels_audio": ("int64", (N, 10)),
        "seg_labels_video": ("int64", (N, 10)),
        "seg_labels_text": ("int64", (N, 10)),
        "split": ("int64", (N,)),
        "video_box": ("int64", (N, 10, 4)),
    }
    assert data["split"].tolist() == [0, 0, 0, 1, 1, 2, 2]
    for name in clips.MODALITIES:
        assert np.isfinite(data[name]).all()
        assert len(np.unique(data[name].reshape(N, -1), axis=0)) == N


def test_same_seed_same_bits(data: dict[str, np.ndarray]) -> None:
    assert equal(data, digits.render(5, clips=COUNTS))


def test_other_seed_other_clips(data: dict[str, np.ndarray]) -> None:
    other = digits.render(6, clips=COUNTS)
    for name in clips.MODALITIES:
        assert not (data[name] == other[name]).all(axis=tuple(range(1, data[name].ndim))).any()


def test_a_clip_does_not_depend_on_the_number_of_clips(data: dict[str, np.ndarray]) -> None:
    fewer = digits.render(5, clips=(1, 2, 0))
    assert equal(fewer, {name: array[[0, 3, 4]] for name, array in data.items()})


def test_segments_follow_the_plot(data: dict[str, np.ndarray]) -> None:
    for name in clips.MODALITIES:
        shared = data[f"seg_labels_{name}"] == data["labels"][:, None]
        assert np.isin(shared.sum(1), range(3, 8)).all()
        assert np.array_equal(shared, data["seg_labels_audio"] == data["labels"][:, None])


def test_plots_share_one_event(plots: list[clips.Clip]) -> None:
    lengths, starts = set(), set()
    for label, shown in plots:
        events = [np.flatnonzero(shown[name] == label) for name in clips.MODALITIES]
        assert all(np.array_equal(event, events[0]) for event in events)
        assert np.array_equal(events[0], np.arange(events[0][0], events[0][0] + len(events[0])))
        lengths.add(len(events[0]))
        starts.add(int(events[0][0]))
    assert lengths == {3, 4, 5, 6, 7}
    assert starts == set(range(8))
    assert {clip.label for clip in plots} == set(range(10))


def test_distractors_are_of_one_modality_and_shorter_than_the_event(
    plots: list[clips.Clip],
) -> None:
    distracted = 0
    for label, shown in plots:
        others = [set(shown[name].tolist()) - {label, clips.BACKGROUND} for name in shown]
        assert all(len(other) <= 1 for other in others)
        assert len(set().union(*others)) == sum(map(len, others))
        distracted += sum(map(len, others))
        for digits_shown in shown.values():
            run = np.flatnonzero((digits_shown != label) & (digits_shown != clips.BACKGROUND))
            assert len(run) < (digits_shown == label).sum()
            assert len(run) == 0 or np.ptp(run) == len(run) - 1
    draws = 3 * len(plots)
    assert abs(distracted - 0.3 * draws) < 5 * np.sqrt(0.3 * 0.7 * draws)


def test_boxes_lie_in_the_frame_where_a_digit_is_shown(data: dict[str, np.ndarray]) -> None:
    shown = data["seg_labels_video"] >= 0
    x0, y0, x1, y1 = np.moveaxis(data["video_box"][shown], -1, 0)
    assert (x0 >= 0).all()
    assert (y0 >= 0).all()
    assert (x0 < x1).all()
    assert (y0 < y1).all()
    assert (x1 <= pictures.FRAME).all()
    assert (y1 <= pictures.FRAME).all()
    assert not data["video_box"][~shown].any()


def test_the_digit_is_in_its_box() -> None:
    frames, boxes = pictures.film(np.arange(10), 2, np.random.default_rng(0))
    for frame, (x0, y0, x1, y1) in zip(frames, boxes, strict=True):
        outside = frame.copy()
        outside[y0:y1, x0:x1] = np.nan
        assert frame[y0:y1, x0:x1].mean() > 3 * np.nanmean(outside)


def test_writers_are_disjoint() -> None:
    _, classes = pictures._handwriting()
    for writers in (style.HOME.writers, style.NUMBERS.writers):
        pools = [set(samples) for samples in writers]
        assert len(set().union(*pools)) == sum(map(len, pools))
        others = set().union(*(x for split, x in enumerate(writers) if split != 2))
        assert min(writers[2]) - max(others) > 1797 // 13  # a whole writer lies between
        for samples in writers:
            assert set(classes[list(samples)]) == set(range(10))


def test_voices_are_disjoint() -> None:
    casts = [set(speech.voices(0, split)) for split in range(4)]
    assert [len(cast) for cast in casts] == list(speech.VOICES.values())
    assert len(set().union(*casts)) == sum(map(len, casts))
    assert speech.voices(0, 1) == speech.voices(0, 1) != speech.voices(1, 1)


@pytest.mark.parametrize("table", ["TEMPLATES", "NAMES", "NOUNS", "PLACES"])
def test_words_are_disjoint(table: str) -> None:
    lists = [
        words.split() if isinstance(words, str) else words for words in getattr(sentences, table)
    ]
    assert len(lists) == 4
    assert len(set().union(*lists)) == sum(map(len, lists))


def test_sentences_name_their_digit_and_no_other() -> None:
    shown = np.tile(np.arange(-1, 10), 20)
    for split in range(3):
        written = sentences.write(shown, split, np.random.default_rng(split))
        for digit, sentence in zip(shown, written, strict=True):
            named = set(sentence.split()) & set(DIGITS.names)
            assert named == ({DIGITS.names[digit]} if digit >= 0 else set())


def test_sentences_are_hashed_the_same_everywhere() -> None:
    features = sentences.read(["nine", "nine again"])
    assert np.linalg.norm(features, axis=1) == pytest.approx([1, 1], abs=1e-6)
    places = [62, 109, 149, 175, 295, 440, 452, 537, 545, 591, 603, 640, 763, 765]
    assert np.flatnonzero(features[0]).tolist() == places


def test_a_slow_voice_speaks_longer() -> None:
    def frames(pace: float) -> float:
        voice, rng = speech.Voice(120.0, 1.0, pace, 0.1), np.random.default_rng(0)
        mouths = np.stack([speech._articulate(DIGITS.sounds[1], voice, rng, 70) for _ in range(50)])
        return float(np.count_nonzero(mouths[..., 3], axis=1).mean()) - len(speech.SMOOTH) + 1

    assert frames(0.8) / frames(1.25) == pytest.approx(1.25 / 0.8, rel=0.05)


def test_pulses_come_at_the_pitch_of_the_voice() -> None:
    voice = speech.Voice(200.0, 1.0, 1.0, 0.0)
    pulses = speech._pulses(20, voice, np.random.default_rng(0), 70)
    seconds = pulses.shape[1] / speech.RATE
    rate = np.count_nonzero(pulses, axis=1) / seconds
    assert (rate >= 200 * (0.9 - 0.2 * seconds) - 1 / seconds).all()
    assert (rate <= 200 * 1.2).all()
    assert (pulses**2).mean(1) == pytest.approx(rate / 200, rel=1e-4)


@pytest.mark.usefixtures("small")
def test_load_renders_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = digits.load(3, tmp_path / "new")
    assert path.parent == tmp_path / "new"
    assert "3" in path.stem
    assert f"v{digits.VERSION}" in path.stem
    assert equal(read(path), digits.render(3))
    monkeypatch.setattr(digits, "render", None)
    assert digits.load(3, tmp_path / "new") == path
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.usefixtures("small")
def test_cache_folder_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMVQ_CACHE", str(tmp_path))
    assert digits.load(0).parent == tmp_path


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
def test_a_torn_file_is_rendered_again(tmp_path: Path, damage: str) -> None:
    path = digits.load(0, tmp_path)
    whole = path.read_bytes()
    half = len(whole) // 2
    flipped = whole[:half] + bytes([whole[half] ^ 255]) + whole[half + 1 :]
    torn = {"cut": whole[:half], "empty": b"", "flipped": flipped}
    path.write_bytes(torn[damage])
    assert digits.load(0, tmp_path) == path
    assert equal(read(path), digits.render(0))


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: BinaryIO, **_: object) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "render", lambda _: {})
    monkeypatch.setattr(digits.np, "savez", fail)
    with pytest.raises(KeyboardInterrupt):
        digits.load(0, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def numbers() -> dict[str, np.ndarray]:
    return digits.render(5, clips=(2, 3, 3, 2), style=style.NUMBERS)


def test_numbers_have_names_sounds_and_figures() -> None:
    assert NUMBERS.figures[0] == (1, 2)
    assert NUMBERS.figures[-1] == (3, 9)
    names = dict(zip(NUMBERS.figures, NUMBERS.names, strict=True))
    assert names[1, 2] == "twelve"
    assert names[1, 8] == "eighteen"
    assert names[2, 7] == "twenty seven"
    assert len(set(names.values())) == len(set(NUMBERS.sounds)) == 21
    assert len({frozenset(x) for x in NUMBERS.figures}) == 21  # told apart in any order
    for things in (DIGITS, NUMBERS):
        assert all(set(sound.split()) <= set(speech.PHONEMES) for sound in things.sounds)


def test_numbers_have_frames_as_a_whole_and_a_split_3(numbers: dict[str, np.ndarray]) -> None:
    assert numbers["split"].tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert numbers["video"].shape == (10, 10, 2 * pictures.CHANNELS)
    assert equal(numbers, digits.render(5, clips=(2, 3, 3, 2), style=style.NUMBERS))
    frames = digits.render_clip(5, 0, 0, style.NUMBERS).frames
    cells = pictures.see(frames).reshape(10, -1, pictures.CHANNELS)
    both = np.concatenate([cells.mean(1), cells.max(1)], -1).astype(np.float16)
    assert np.array_equal(numbers["video"][0], both)


def test_modalities_of_numbers_are_shifted_and_miss_some_of_the_event() -> None:
    rng = np.random.default_rng(0)
    made = [clips.compose(rng, style.NUMBERS) for _ in range(500)]
    assert {clip.label for clip in made} == set(range(21))
    starts, share, others = [], [], 0
    for label, shown in made:
        events = [np.flatnonzero(shown[name] == label) for name in clips.MODALITIES]
        starts.append(max(x[0] for x in events) - min(x[0] for x in events))
        share += [len(x) for x in events]
        others += sum(bool(set(x.tolist()) - {label, clips.BACKGROUND}) for x in shown.values())
    assert 0.5 < np.mean(np.array(starts) > 0) < 1
    assert min(share) == 1
    assert max(share) == 7
    assert np.mean(share) == pytest.approx(0.8 * 5, abs=0.3)  # and one or more
    assert others / 1500 == pytest.approx(0.5, abs=0.05)


def test_clutter_is_seen_heard_and_read() -> None:
    clear = replace(style.NUMBERS, clutter=0.0)
    always = replace(style.NUMBERS, clutter=1.0)
    shown = np.full(200, 3)

    def made(how: style.Style) -> tuple[np.ndarray, np.ndarray, str]:
        frames, _ = pictures.film(shown, 0, np.random.default_rng(1), how)
        voice = speech.voices(0, 0)[0]
        sound = speech.record(shown, voice, np.random.default_rng(1), how)
        return frames, sound, " ".join(sentences.write(shown, 0, np.random.default_rng(1), how))

    (frames, sound, text), (more, louder, misspelt) = made(clear), made(always)
    assert (more > 0.3).sum() > 1.1 * (frames > 0.3).sum()
    assert (louder**2).mean() > 1.1 * (sound**2).mean()
    name = NUMBERS.names[3]
    assert text.count(name) == 200
    assert misspelt.count(name) < 50  # of letters, one in four is wrong


def test_another_style_has_the_same_arrays_and_other_clips(numbers: dict[str, np.ndarray]) -> None:
    away = digits.render(5, clips=(2, 3, 3, 2), style=style.AWAY)
    assert {name: x.shape for name, x in away.items()} == {
        name: x.shape for name, x in numbers.items()
    }
    for name in clips.MODALITIES:
        assert not (away[name][0] == numbers[name][0]).all()
    for split in range(4):
        both = (set(speech.voices(0, split, x)) for x in (style.NUMBERS, style.AWAY))
        assert not set.intersection(*both)


def test_slanted_handwriting_leans_to_the_right() -> None:
    ones = np.ones(100, dtype=np.int64)

    def lean(hand: style.Style) -> float:
        frames, _ = pictures.film(ones, 2, np.random.default_rng(0), hand)
        ink = frames > 0.4
        row, column = (np.broadcast_to(x, ink.shape) for x in np.mgrid[:56, :56])
        slopes = [np.polyfit(r[i], c[i], 1)[0] for r, c, i in zip(row, column, ink, strict=True)]
        return float(np.median(slopes))  # columns to the right per row down

    leaning = style.Style(slant=-0.5)
    assert lean(leaning) < lean(style.HOME) - 0.2


def test_echoes_come_later() -> None:
    quiet, echoing = style.Style(), style.Style(echo=0.5)
    voice = speech.voices(0, 0)[0]
    spoken = np.array([3])
    dry = speech.record(spoken, voice, np.random.default_rng(0), quiet)
    wet = speech.record(spoken, voice, np.random.default_rng(0), echoing)
    assert (dry[:, : speech.ECHO] == wet[:, : speech.ECHO]).all()
    assert (wet**2).sum() > 1.05 * (dry**2).sum()


def test_scenes_show_the_named_number_and_another_one() -> None:
    named = np.tile(np.arange(-1, 10), 4)
    frames, masks, boxes = pictures.film_pair(
        named, (named + 1) % 21, 2, np.random.default_rng(0), style.SCENES
    )
    assert (masks.any((1, 2)) == (named >= 0)).all()
    for frame, mask, (x0, y0, x1, y1) in zip(frames, masks, boxes, strict=True):
        assert mask.sum() == mask[y0:y1, x0:x1].sum()
        if mask.any():
            ink = frame > 0.6 * np.quantile(frame[mask], 0.5)
            assert ink[mask].mean() > 0.8  # the number is drawn where the mask says
            assert ink[~mask].sum() > 20  # and so is something else


def test_scenes_are_named_alike_by_sound_and_text() -> None:
    scenes = digits.render_scenes(3, clips=(1, 2, 2))
    assert np.array_equal(scenes["seg_labels_audio"], scenes["seg_labels_text"])
    assert np.array_equal(scenes["masks"].any((2, 3)), scenes["seg_labels_video"] >= 0)
    assert equal(scenes, digits.render_scenes(3, clips=(1, 2, 2)))


def test_every_set_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"split": np.zeros(1)}
    monkeypatch.setattr(digits, "render", lambda *_, **__: one)
    monkeypatch.setattr(digits, "render_scenes", lambda *_: one)
    makers = (digits.load, digits.load_numbers, digits.load_away, digits.load_scenes)
    assert len({make(seed, tmp_path) for make in makers for seed in (0, 1)}) == 8
