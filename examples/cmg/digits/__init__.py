"""The built-in data set: the digits 0 to 9 filmed, spoken and written, rendered on first use.

Nothing is downloaded: handwriting comes with scikit-learn, speech and sentences are made here.
The arrays are those of the generic file that every data set of the example has:

    audio             float32 [N, 10, 128]           log-mel, eight steps of sixteen bands
    video             float16 [N, 10, 7, 7, 512]     random features of a 7 x 7 grid
    text              float32 [N, 10, 768]           hashed character n-grams
    labels            int64 [N]                      the digit of the shared event
    seg_labels_audio  int64 [N, 10]                  the digit heard, -1 = background
    seg_labels_video  int64 [N, 10]                  the digit seen
    seg_labels_text   int64 [N, 10]                  the digit named
    split             int64 [N]                      0 pre-train, 1 train, 2 test
    video_box         int64 [N, 10, 4]               x0 y0 x1 y1 of the digit seen, in pixels of the
                                                     56 x 56 frame, ends exclusive; zeros = no digit

Test clips share no writer, voice, template, name, noun or place with the other splits.

Two more sets of the same shapes are for downstream tests. `load_away` has clips of another house,
see style.py. `load_scenes` shows two digits in a frame, of which sound and text name one:

    frames            uint8 [N, 10, 56, 56]          what is filmed, in HOME's style
    masks             bool  [N, 10, 56, 56]          the pixels of the digit that is named
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cmg.digits import clips as plots
from cmg.digits import pictures, sentences, speech
from cmg.digits.style import AWAY, HOME, Style

__all__ = ["load", "load_away", "load_scenes", "render", "render_scenes"]

VERSION = 1
T = plots.SEGMENTS


def render(
    seed: int = 0, *, clips: tuple[int, int, int] = (700, 400, 300), style: Style = HOME
) -> dict[str, np.ndarray]:
    """Render `clips` clips of the splits 0, 1 and 2.

    A clip depends on the seed, the style, its split and its place in the split only: asking for
    more clips leaves the first ones as they are.
    """
    N = sum(clips)
    data = {
        "audio": np.empty((N, T, speech.STEPS * speech.BANDS), np.float32),
        "video": np.empty((N, T, pictures.GRID, pictures.GRID, pictures.CHANNELS), np.float16),
        "text": np.empty((N, T, sentences.WIDTH), np.float32),
        "labels": np.empty(N, np.int64),
        **{f"seg_labels_{name}": np.empty((N, T), np.int64) for name in plots.MODALITIES},
        "split": np.repeat(np.arange(3), clips),
        "video_box": np.empty((N, T, 4), np.int64),
    }
    voices = [speech.voices(seed, split, style) for split in range(3)]
    places = [(split, place) for split in range(3) for place in range(clips[split])]
    for n, (split, place) in enumerate(places):
        key = (split, place, *style.name.encode())
        streams = np.random.SeedSequence(seed, spawn_key=key).spawn(4)
        plot, film, sound, words = (np.random.default_rng(stream) for stream in streams)
        clip = plots.compose(plot, style)
        voice = voices[split][sound.integers(len(voices[split]))]
        frames, data["video_box"][n] = pictures.film(clip.shown["video"], split, film, style)
        data["video"][n] = pictures.see(frames)
        data["audio"][n] = speech.hear(speech.record(clip.shown["audio"], voice, sound, style))
        data["text"][n] = sentences.read(sentences.write(clip.shown["text"], split, words, style))
        data["labels"][n] = clip.label
        for name in plots.MODALITIES:
            data[f"seg_labels_{name}"][n] = clip.shown[name]
    return data


def render_scenes(
    seed: int = 0, *, clips: tuple[int, int, int] = (1, 500, 200)
) -> dict[str, np.ndarray]:
    """Render clips of two digits at a time; what names one of them is as in HOME."""
    data = render(seed, clips=clips, style=Style(name="scenes", distracted=0.0))
    N = len(data["split"])
    data["frames"] = np.empty((N, T, pictures.FRAME, pictures.FRAME), np.uint8)
    data["masks"] = np.empty(data["frames"].shape, bool)
    for n, split in enumerate(data["split"]):
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(n, *b"pairs")))
        named = data["seg_labels_video"][n]
        others = (named + rng.integers(1, plots.CLASSES, T)) % plots.CLASSES
        frames, data["masks"][n], data["video_box"][n] = pictures.film_pair(
            named, others, int(split), rng
        )
        data["video"][n] = pictures.see(frames)
        data["frames"][n] = 255 * frames.clip(0, 1)
    return data


def load(seed: int = 0, cache_dir: str | Path | None = None) -> Path:
    """Return the npz file of a seed, rendered on first use.

    Args:
        seed: Which rendering.
        cache_dir: Where files are kept; by default `$MMVQ_CACHE`, or else `~/.cache/mmvq`.

    A file that is cut short or damaged is rendered again.
    """
    return _cached(f"digits-v{VERSION}-seed{seed}", lambda: render(seed), cache_dir)


def load_away(seed: int = 0, cache_dir: str | Path | None = None) -> Path:
    """The like of `load` for clips of another house; split 0 is one clip."""

    def make() -> dict[str, np.ndarray]:
        return render(seed, clips=(1, 400, 300), style=AWAY)

    return _cached(f"digits-away-v{VERSION}-seed{seed}", make, cache_dir)


def load_scenes(seed: int = 0, cache_dir: str | Path | None = None) -> Path:
    """The like of `load` for clips of two digits at a time; split 0 is one clip."""
    return _cached(f"digits-scenes-v{VERSION}-seed{seed}", lambda: render_scenes(seed), cache_dir)


def _cached(
    name: str, make: Callable[[], dict[str, np.ndarray]], cache_dir: str | Path | None
) -> Path:
    folder = Path(cache_dir or os.environ.get("MMVQ_CACHE") or "~/.cache/mmvq").expanduser()
    path = folder / f"{name}.npz"
    if not _is_whole(path):
        folder.mkdir(parents=True, exist_ok=True)
        _save(path, make())
    return path


def _is_whole(path: Path) -> bool:
    """Say whether an npz file is there and its checksums hold."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # zipfile raises a dozen kinds for damaged bytes
        return False


def _save(path: Path, data: dict[str, np.ndarray]) -> None:
    """Write an npz file under a temporary name, then rename it: readers never see half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            np.savez(file, **data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
