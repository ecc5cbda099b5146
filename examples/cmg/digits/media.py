"""The built-in clips as media files: video with sound, captions and a table of the clips.

    FOLDER/clips/<id>.mp4       10 seconds: H.264 of 224 x 224 pixels, and AAC, mono, 16 kHz
    FOLDER/captions/<id>.txt    ten lines, a sentence for each second
    FOLDER/clips.csv            id, label ("zero" to "nine"; empty in pretrain), split

An id is a split and an index, for example pretrain-0012. Plots, pictures, voices and sentences are
those of `digits.render` for the same seed and style. Second k of a clip is its segment k.

A segment has one picture of 56 x 56 pixels. A camera films it that sways by up to one such pixel.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import DataError
from ..files import new_folder
from ..media.decode import require_av
from ..workers import start_worker
from . import pictures, render_clip, speech, streams
from .style import HOME, Style

SPLITS = ("pretrain", "train", "test")
FPS = 8  # frames per second
ZOOM = 4  # pixels of the film per pixel of a picture
SIDE = ZOOM * pictures.FRAME  # of the film, in pixels
LOUDNESS = 1 / 32  # amplitude in the file of 1 in `speech.record`, whose peaks are below 25
H264 = {"crf": "29", "preset": "veryfast", "bf": "0"}
MPEG4 = {"flags": "+qscale", "global_quality": str(4 * 118)}  # quality 4 of 1 (best) to 31
AAC = {"aac_coder": "fast"}  # a third of the time of the default, at the same size
Place = tuple[int, int]  # split, and index in it


def write_media(
    folder: str | Path,
    seed: int = 0,
    *,
    clips: tuple[int, int, int] = (700, 400, 300),
    style: Style = HOME,
    workers: int | None = None,
) -> None:
    """Write clips as media files, in several processes. The folder appears when it is complete.

    A clip depends only on the seed, the style, its split and its index in the split.

    Args:
        folder: The folder to create.
        seed: Seed of the rendering.
        clips: Number of clips of the splits pretrain, train and test.
        style: Style of the rendering.
        workers: Number of processes; None is the number of CPUs, 8 at most. With 1, all is done
            in this process.

    Raises:
        DataError: The folder is not empty or cannot be written.
        ImportError: PyAV is not installed.
    """
    require_av()
    places = [(split, place) for split in range(3) for place in range(clips[split])]
    with new_folder(folder) as new:
        for name in ("clips", "captions"):
            (new / name).mkdir()
        write = partial(_write_clip, new, seed, style)
        labels = _map(write, places, workers or min(os.cpu_count() or 1, 8))
        with (new / "clips.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(("id", "label", "split"))
            for (split, place), label in zip(places, labels, strict=True):
                word = style.things.names[label] if split else ""
                table.writerow((clip_id(split, place), word, SPLITS[split]))


def clip_id(split: int, place: int) -> str:
    """Name of a clip, for example pretrain-0012."""
    return f"{SPLITS[split]}-{place:04d}"


def film(stills: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Film pictures [T, 56, 56] with an unsteady camera: uint8 [T * FPS, 224, 224].

    The camera sways along both axes, with periods of one to three seconds.
    """
    T = len(stills)
    large = _enlarge(np.pad(stills, ((0, 0), (1, 1), (1, 1)), mode="edge"))
    large = (255 * large.clip(0, 1)).round().astype(np.uint8)
    time = np.arange(T * FPS) / FPS
    rate, phase = rng.uniform(1 / 3, 1, (2, 1)), rng.uniform(0, 1, (2, 1))
    sway = np.rint(ZOOM * (1 + np.sin(2 * np.pi * (rate * time + phase)))).astype(int)  # 0 to 8
    windows = np.lib.stride_tricks.sliding_window_view(large, (SIDE, SIDE), axis=(1, 2))
    return windows[np.arange(T * FPS) // FPS, sway[0], sway[1]]


def _enlarge(images: np.ndarray) -> np.ndarray:
    """Enlarge images [T, S, S] by interpolation: [T, ZOOM * S, ZOOM * S]."""
    size = images.shape[-1]
    place = ((np.arange(ZOOM * size) + 0.5) / ZOOM - 0.5).clip(0, size - 1)
    low = place.astype(int)
    high, part = np.minimum(low + 1, size - 1), (place - low).astype(np.float32)
    rows = images[:, low] * (1 - part[:, None]) + images[:, high] * part[:, None]
    return rows[..., low] * (1 - part) + rows[..., high] * part


def _map(write: Callable[[Place], int], places: list[Place], workers: int) -> list[int]:
    """Apply `write` to all places, in so many processes."""
    bar = partial(tqdm, desc="writing clips", total=len(places), unit="clip", disable=None)
    if min(workers, len(places)) <= 1:
        return list(bar(map(write, places)))
    with ProcessPoolExecutor(min(workers, len(places)), get_context("spawn"), start_worker) as pool:
        try:
            return list(bar(pool.map(write, places)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_clip(folder: Path, seed: int, style: Style, place: Place) -> int:
    """Write the files of one clip; return its label."""
    import av

    clip, name = render_clip(seed, *place, style), clip_id(*place)
    frames = film(clip.frames, streams(seed, *place, style)[-1])
    try:
        _encode(folder / "clips" / f"{name}.mp4", frames, LOUDNESS * clip.sound)
        lines = "".join(f"{sentence}\n" for sentence in clip.sentences)
        (folder / "captions" / f"{name}.txt").write_text(lines, encoding="utf-8", newline="\n")
    except (OSError, av.FFmpegError) as error:
        raise DataError(f"{name}: cannot be written ({error}).") from None
    return clip.plot.label


def _encode(path: Path, frames: np.ndarray, sound: np.ndarray) -> None:
    """Write a video file.

    Args:
        path: The file.
        frames: uint8 [T * FPS, height, width].
        sound: float32 [T, 16000], between -1 and 1.
    """
    import av

    codec, options = ("libx264", H264) if "libx264" in av.codecs_available else ("mpeg4", MPEG4)
    with av.open(path, "w") as file:
        video = file.add_stream(codec, rate=FPS, options=options)
        video.height, video.width, video.pix_fmt = *frames.shape[1:], "yuv420p"
        video.gop_size = FPS  # every segment starts with a key frame
        video.thread_count = 1
        audio = file.add_stream("aac", rate=speech.RATE, layout="mono", options=AAC)
        audio.bit_rate = 32_000
        for second, samples in enumerate(sound):
            for n in range(second * FPS, (second + 1) * FPS):
                picture = av.VideoFrame.from_ndarray(frames[n], format="gray")
                picture.pts = n
                file.mux(video.encode(picture))
            block = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            block.sample_rate, block.pts = speech.RATE, second * speech.RATE
            file.mux(audio.encode(block))
        file.mux(video.encode())
        file.mux(audio.encode())
