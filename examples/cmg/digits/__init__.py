"""The built-in data set: the digits 0 to 9 as video, speech and text, rendered on first use.

Nothing is downloaded: handwriting is part of scikit-learn, speech and sentences are synthesised.
The arrays are those of the data file of the example, see `cmg.data`:

    audio             float32 [N, 10, 128]           log-mel, eight steps of sixteen bands
    video             float16 [N, 10, 7, 7, 512]     random features of a 7 x 7 grid
    text              float32 [N, 10, 768]           hashed character n-grams
    labels            int64 [N]                      the digit of the shared event
    seg_labels_audio  int64 [N, 10]                  the spoken digit, -1 = background
    seg_labels_video  int64 [N, 10]                  the digit in the picture
    seg_labels_text   int64 [N, 10]                  the digit in the sentence
    split             int64 [N]                      0 pre-train, 1 train, 2 test
    video_box         int64 [N, 10, 4]               x0 y0 x1 y1 of the digit in the picture, in
                                                     pixels of the 56 x 56 frame, ends exclusive;
                                                     zeros = no digit

Test clips share no writer, voice, template, name, noun or place with the other splits.

A harder set, the numbers (see style.py), has 21 classes and a split 3, for validation. Its video
features are those of whole frames, [N, 10, 1024]. Two more sets are for models trained on it.
`load_away` has clips in another style. `load_scenes` has two numbers in a frame, of which speech
and text name one, the video features of cells, and

    frames            uint8 [N, 10, 56, 56]          the frames
    masks             bool  [N, 10, 56, 56]          the pixels of the named number

media.py writes the clips as media files instead: video with sound, and captions.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files import cache_folder, write_atomic
from . import clips as plots
from . import pictures, sentences, speech
from .style import AWAY, HOME, NUMBERS, SCENES, Style

__all__ = [
    "Rendered",
    "load",
    "load_away",
    "load_numbers",
    "load_scenes",
    "render",
    "render_clip",
    "render_scenes",
    "streams",
]

VERSION = 1
NUMBERS_CLIPS = (1200, 420, 800, 400)  # of the splits 0 to 3
T = plots.SEGMENTS


class Rendered(NamedTuple):
    """One clip as it is seen, heard and read.

    Attributes:
        plot: The class of every segment of each modality.
        frames: float32 [T, 56, 56], one a segment: 0 is black, 1 is white, noise goes beyond.
        boxes: int64 [T, 4], x0 y0 x1 y1 of the digit in pixels, ends exclusive; zeros = no digit.
        sound: float32 [T, 16000], one second a segment; speech has power 1 on average.
        sentences: T sentences.
    """

    plot: plots.Clip
    frames: np.ndarray
    boxes: np.ndarray
    sound: np.ndarray
    sentences: list[str]


def streams(
    seed: int, split: int, place: int, style: Style = HOME
) -> tuple[np.random.Generator, ...]:
    """Random generators of one clip: for its plot, picture, sound, sentences and camera."""
    key = (split, place, *style.name.encode())
    children = np.random.SeedSequence(seed, spawn_key=key).spawn(5)
    return tuple(np.random.default_rng(child) for child in children)


def render_clip(seed: int, split: int, place: int, style: Style = HOME) -> Rendered:
    """Render one clip, which depends only on these arguments.

    Args:
        seed: Seed of the data set.
        split: 0, 1 or 2, or 3 in a style with a validation split.
        place: Index of the clip in its split.
        style: Style of the rendering.
    """
    story, film, sound, words, _ = streams(seed, split, place, style)
    plot = plots.compose(story, style)
    voices = speech.voices(seed, split, style)
    voice = voices[sound.integers(len(voices))]
    frames, boxes = pictures.film(plot.shown["video"], split, film, style)
    heard = speech.record(plot.shown["audio"], voice, sound, style)
    return Rendered(
        plot, frames, boxes, heard, sentences.write(plot.shown["text"], split, words, style)
    )


def render(
    seed: int = 0, *, clips: tuple[int, ...] = (700, 400, 300), style: Style = HOME
) -> dict[str, np.ndarray]:
    """Render so many clips of the splits 0, 1, 2 and so on.

    A clip depends only on the seed, the style, its split and its index in the split. With more
    clips, the first ones are the same.
    """
    N = sum(clips)
    data = {
        "audio": np.empty((N, T, speech.STEPS * speech.BANDS), np.float32),
        "video": np.empty((N, T, *pictures.shape(style)), np.float16),
        "text": np.empty((N, T, sentences.WIDTH), np.float32),
        "labels": np.empty(N, np.int64),
        **{f"seg_labels_{name}": np.empty((N, T), np.int64) for name in plots.MODALITIES},
        "split": np.repeat(np.arange(len(clips)), clips),
        "video_box": np.empty((N, T, 4), np.int64),
    }
    places = [(split, place) for split in range(len(clips)) for place in range(clips[split])]
    for n, (split, place) in enumerate(places):
        clip = render_clip(seed, split, place, style)
        data["audio"][n] = speech.hear(clip.sound)
        data["video"][n] = pictures.see(clip.frames, style)
        data["text"][n] = sentences.read(clip.sentences)
        data["labels"][n] = clip.plot.label
        for name in plots.MODALITIES:
            data[f"seg_labels_{name}"][n] = clip.plot.shown[name]
        data["video_box"][n] = clip.boxes
    return data


def render_scenes(
    seed: int = 0, *, clips: tuple[int, int, int] = (1, 500, 200)
) -> dict[str, np.ndarray]:
    """Render clips of the style SCENES."""
    data = render(seed, clips=clips, style=SCENES)
    N = len(data["split"])
    data["frames"] = np.empty((N, T, pictures.FRAME, pictures.FRAME), np.uint8)
    data["masks"] = np.empty(data["frames"].shape, bool)
    for n, split in enumerate(data["split"]):
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(n, *b"pairs")))
        named = data["seg_labels_video"][n]
        classes = len(SCENES.things.names)
        others = (named + rng.integers(1, classes, T)) % classes
        frames, data["masks"][n], data["video_box"][n] = pictures.film_pair(
            named, others, int(split), rng, SCENES
        )
        data["video"][n] = pictures.see(frames)
        data["frames"][n] = 255 * frames.clip(0, 1)
    return data


def load(seed: int = 0, cache_dir: str | Path | None = None) -> Path:
    """Return the npz file of a seed, rendered on first use or if the file is damaged.

    Args:
        seed: Seed of the rendering.
        cache_dir: Folder of the file. None is `cmg.files.cache_folder`.
    """
    return _cached(f"digits-v{VERSION}-seed{seed}", lambda: render(seed), cache_dir)


def load_numbers(seed: int = 0, cache_dir: str | Path | None = None) -> Path:
    """Like `load`, for the numbers: 1,200, 420, 800 and 400 clips of the splits 0 to 3."""
    name = f"numbers-v{VERSION}-seed{seed}"
    return _cached(name, lambda: render(seed, clips=NUMBERS_CLIPS, style=NUMBERS), cache_dir)


def load_away(seed: int = 0, cache_dir: str | Path | None = None) -> Path:
    """Like `load`, for numbers in the style AWAY; split 0 has one clip."""
    name = f"numbers-away-v{VERSION}-seed{seed}"
    return _cached(name, lambda: render(seed, clips=(1, 400, 300), style=AWAY), cache_dir)


def load_scenes(seed: int = 0, cache_dir: str | Path | None = None) -> Path:
    """Like `load`, for clips with two numbers in each frame; split 0 has one clip."""
    return _cached(f"numbers-scenes-v{VERSION}-seed{seed}", lambda: render_scenes(seed), cache_dir)


def _cached(
    name: str, make: Callable[[], dict[str, np.ndarray]], cache_dir: str | Path | None
) -> Path:
    path = Path(cache_dir or cache_folder()).expanduser() / f"{name}.npz"
    if not _is_whole(path):
        data = make()
        write_atomic(path, lambda file: np.savez(file, **data))
    return path


def _is_whole(path: Path) -> bool:
    """Whether an npz file exists and its checksums are right."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # zipfile raises many types for damaged bytes
        return False
