"""Small real media files, each with a picture and a sound that tell their time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

WIDTH, HEIGHT, FPS, RATE = 64, 48, 10, 16_000
Array = np.ndarray[Any, Any]


def grey(time: float) -> int:
    """The brightness of the picture in the second of a time."""
    return 20 + 25 * int(time)


def plain(time: float, width: int = WIDTH, height: int = HEIGHT) -> Array:
    """A frame of one brightness."""
    return np.full((height, width, 3), grey(time), np.uint8)


def left_bright(time: float) -> Array:
    """A frame whose left half is white."""
    frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    frame[:, : WIDTH // 2] = 255
    return frame


def beeps(seconds: float, rate: int = RATE) -> Array:
    """A tone in every odd second."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * 440 * time) * (time.astype(int) % 2)).astype(np.float32)


def film(
    path: Path,
    seconds: float = 4,
    *,
    fps: int = FPS,
    shown: Callable[[float], Array] = plain,
    drop: Callable[[int], bool] = lambda k: False,
    sound: Array | None = None,
    rate: int = RATE,
    layout: str = "mono",
    codecs: tuple[str, str] = ("libx264", "aac"),
    late: float = 0.0,
    options: dict[str, str] | None = None,
    aspect: Fraction | None = None,
) -> Path:
    """Encode a film.

    Args:
        path: File; its suffix is the container.
        seconds: Length of the picture; 0: no picture.
        fps: Frames a second.
        shown: The frame of a time.
        drop: Frames to leave out, by number, which makes the rate vary.
        sound: Mono sound; None: none.
        rate: Of the sound, samples a second.
        layout: Of its channels, which are all the same.
        codecs: Of picture and sound.
        late: Seconds by which the sound begins later than the picture.
        options: Of the container.
        aspect: Of a pixel, width over height.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as box:
        if seconds:
            first = shown(0)
            picture = box.add_stream(codecs[0], rate=fps)
            picture.width, picture.height, picture.pix_fmt = *first.shape[1::-1], "yuv420p"
            if aspect:
                picture.codec_context.sample_aspect_ratio = aspect
        if sound is not None:
            heard = box.add_stream(codecs[1], rate=rate, layout=layout)
        if seconds:
            for k in range(round(seconds * fps)):
                if not drop(k):
                    frame = av.VideoFrame.from_ndarray(shown(k / fps), format="rgb24")
                    frame.pts = k
                    box.mux(picture.encode(frame))
            box.mux(picture.encode())
        if sound is not None:
            channels = av.AudioLayout(layout).nb_channels
            resampler = av.AudioResampler(heard.format, layout, rate)
            for start in range(0, len(sound), 1024):
                block = np.tile(sound[start : start + 1024, None], channels).reshape(1, -1)
                frame = av.AudioFrame.from_ndarray(block, format="flt", layout=layout)
                frame.sample_rate, frame.pts = rate, start + round(late * rate)
                for part in resampler.resample(frame):
                    box.mux(heard.encode(part))
            box.mux(heard.encode())
    return path


def turned(path: Path) -> Path:
    """Write into an mp4 that players turn the picture clockwise by 90 degrees, as phones do."""
    one = (1).to_bytes(2, "big") + bytes(2)
    upright = one + bytes(12) + one + bytes(12) + bytes.fromhex("40000000")
    right = (
        bytes(4)
        + one
        + bytes(4)
        + bytes.fromhex("ffff0000")
        + bytes(16)
        + bytes.fromhex("40000000")
    )
    content = path.read_bytes()
    track = content.index(upright, content.index(b"tkhd"))
    path.write_bytes(content[:track] + right + content[track + len(upright) :])
    return path


def captions(folder: Path, name: str, lines: Sequence[str]) -> None:
    """Write captions/<name>.txt."""
    path = folder / "captions" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
