"""Decode a clip: frames and sound at their times, and captions.

Segment k of T covers the seconds k S / T to (k + 1) S / T of the clip, for picture and sound alike.
Times are the time stamps of the file, from its start, so that a variable frame rate, a late start
or a gap in one stream does not move it against the other. Segments that the file does not show are
not valid. A file that is damaged gives what can be decoded of it, and a note.

PyAV decodes, because its wheel holds FFmpeg and works with any torch; torchcodec needs an FFmpeg of
the system and a matching release of torch. Only local files in the formats below are opened: a
playlist that names other files or addresses is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import optional_import
from .folder import Source

Array = np.ndarray[Any, Any]
_SAFE = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,"
    "ogg,wav,w64,flac,mp3,aac,aiff",
}
_SILENCE = 1e-4  # amplitude: -80 dB of full scale
_LARGEST_CAPTION = 1 << 20  # bytes
_MOST_PIXELS = 1 << 26  # of a frame
_HOLDS = {"video": "frames", "audio": "sound", "text": "captions"}  # attributes of `Decoded`
_WIDEST = 4  # of the sides of a frame; longer ones are compressed to it before the crop
_JUMP = 0.04  # seconds between the time stamp of sound and where it would follow


class Cut(NamedTuple):
    """How clips are cut, and what of them is needed.

    Attributes:
        segments: Number of segments T.
        seconds: Length S of a clip.
        frames: Frames of a segment, equally spaced; 0: no picture is needed.
        size: Height and width of a frame in pixels: the centre of the picture.
        rate: Samples of sound a second; 0: no sound is needed.
        captions: Whether captions are needed.
    """

    segments: int
    seconds: float
    frames: int
    size: int
    rate: int
    captions: bool

    @property
    def samples(self) -> int:
        """Samples of sound in a segment."""
        return max(round(self.rate * self.seconds / self.segments), 1)


@dataclass
class Decoded:
    """A decoded clip. What is not needed is None; what is not there is not valid.

    Attributes:
        frames: uint8 [T, F, size, size, 3], RGB.
        sound: float32 [T, samples], the mean of the channels, within -1 and 1.
        captions: T lines of text.
        valid: "video", "audio" or "text" -> bool [T].
        notes: (modality, what is wrong) of the clip.
    """

    frames: Array | None = None
    sound: Array | None = None
    captions: list[str] | None = None
    valid: dict[str, Array] = field(default_factory=dict)
    notes: list[tuple[str, str]] = field(default_factory=list)


def require_av() -> None:
    """Check that PyAV is installed.

    Raises:
        DataError: It is not.
    """
    with optional_import("video and sound (PyAV)", "pip install 'mmvq[media]'"):
        import av  # noqa: F401


def decode(source: Source, cut: Cut) -> Decoded:
    """Decode what is needed of a clip. Files with errors give notes and do not raise."""
    clip = undecoded(cut)
    parts: dict[str, tuple[Any, Path | None]] = {
        "video": (_frames, source.picture),
        "audio": (_sound, source.sound),
        "text": (_captions, source.captions),
    }
    for name in clip.valid:
        read, path = parts[name]
        try:
            if path is None:
                raise FileNotFoundError
            data, clip.valid[name], notes = read(path, cut)
            setattr(clip, _HOLDS[name], data)
        except FileNotFoundError:
            notes = ["no file"]
        except Exception as error:  # PyAV raises many types for damaged files; the note names it
            notes = [f"cannot be decoded: {type(error).__name__}, {_first(error)}"]
        clip.notes += [(name, note) for note in notes]
    return clip


def undecoded(cut: Cut, *notes: str) -> Decoded:
    """A clip of which nothing is valid, with a note in each modality that is needed."""
    T = cut.segments
    clip = Decoded()
    if cut.frames:
        clip.frames = np.zeros((T, cut.frames, cut.size, cut.size, 3), np.uint8)
    if cut.rate:
        clip.sound = np.zeros((T, cut.samples), np.float32)
    if cut.captions:
        clip.captions = [""] * T
    needed = [name for name, data in _HOLDS.items() if getattr(clip, data) is not None]
    clip.valid = {name: np.zeros(T, bool) for name in needed}
    clip.notes = [(name, note) for name in needed for note in notes]
    return clip


def _frames(path: Path, cut: Cut) -> tuple[Array, Array, list[str]]:
    """Frames [T, F, size, size, 3], which segments are valid [T], and notes."""
    T, F, wanted = cut.segments, cut.frames, cut.segments * cut.frames
    frames = np.zeros((wanted, cut.size, cut.size, 3), np.uint8)
    there = np.zeros(wanted, bool)
    times = (np.arange(wanted) + 0.5) * cut.seconds / wanted
    stream, shown, done, until = _Stream(path, "video"), None, 0, 0.0

    def put(stop: float) -> int:
        """The last frame is the picture until this time."""
        last = int(np.searchsorted(times, stop))
        if shown is not None and last > done:
            there[done:last] = True
            frames[done:last] = _square(shown, cut.size, stream.aspect)
        return max(last, done)

    for time, lasting, frame in stream:
        if (done := put(time)) == wanted:
            break
        shown, until = frame, time + lasting
    else:
        last = put(until)
        frames[last:] = frames[last - 1] if last else 0  # for the rest of its segment
    if there.any():  # before the first frame too
        frames[: there.argmax()] = frames[there.argmax()]
    valid = there.reshape(T, F).mean(1) >= 0.5
    notes = stream.notes + _ending("picture", valid, stream, cut)
    return frames.reshape(T, F, *frames.shape[1:]), valid, notes


def _square(frame: Any, size: int, aspect: float) -> Array:
    """The centre of a frame, uint8 [size, size, 3], upright; aspect is that of its pixels."""
    width, height = frame.width, frame.height
    ratio = min(max(width * aspect / height, 1 / _WIDEST), _WIDEST)
    width, height = round(size * max(ratio, 1)), round(size * max(1 / ratio, 1))
    image = frame.reformat(width, height, "rgb24", interpolation="AREA").to_ndarray()
    top, left = (height - size) // 2, (width - size) // 2
    image = image[top : top + size, left : left + size]
    return np.rot90(image, round((frame.rotation or 0) / 90))


def _sound(path: Path, cut: Cut) -> tuple[Array, Array, list[str]]:
    """Sound [T, samples], which segments are valid [T], and notes."""
    import av

    total = cut.segments * cut.samples
    sound, covered = np.zeros(total, np.float32), np.zeros(total, bool)
    stream = _Stream(path, "audio")

    def put(start: int, part: Any) -> int:
        """Write the mean of the channels; return where it ends."""
        block = part.to_ndarray().reshape(-1, part.layout.nb_channels).mean(1)
        first, last = max(start, 0), min(start + len(block), total)
        if last > first:
            sound[first:last] = block[first - start : last - start]
            covered[first:last] = True
        return start + len(block)

    resampler = form = None
    cursor = 0
    for time, _, frame in stream:
        if (known := (frame.sample_rate, frame.layout.name, frame.format.name)) != form:
            # packed, as PyAV reads at most 8 planes of a planar frame
            resampler, form = av.AudioResampler("flt", None, cut.rate), known
        expected = round(time * cut.rate)
        if abs(expected - cursor) > _JUMP * cut.rate:
            cursor = expected
        if cursor >= total:
            break
        frame.pts = None  # times are ours
        for part in resampler.resample(frame):
            cursor = put(cursor, part)
    else:
        if resampler is not None:
            for part in resampler.resample(None):
                cursor = put(cursor, part)
    notes = stream.notes
    if not (finite := np.isfinite(sound)).all():
        covered &= finite
        sound[~finite] = 0
        notes.append("has samples that are NaN or Inf")
    valid = covered.reshape(cut.segments, -1).mean(1) >= 0.5
    notes += _ending("sound", valid, stream, cut)
    if valid.any() and np.abs(sound).max() < _SILENCE:
        valid, notes = np.zeros_like(valid), [*notes, "silent"]
    return sound.clip(-1, 1).reshape(cut.segments, -1), valid, notes


def _ending(what: str, valid: Array, stream: _Stream, cut: Cut) -> list[str]:
    """A note if a file is shorter than the clip, or longer by a segment or more."""
    if not valid.any():
        return [] if stream.notes else [f"no {what} in the first {cut.seconds:g} s"]
    if not valid.all():
        return [f"shorter than the clip: {what} in {int(valid.sum())} of {len(valid)} segments"]
    if stream.seconds >= cut.seconds * (1 + 1 / cut.segments):
        used = f"only the first {cut.seconds:g} of {stream.seconds:.1f} s are used"
        return [f"longer than the clip: {used}"]
    return []


class _Stream:
    """The decoded frames of the picture or the sound of a file: time, duration, frame.

    Errors end it or leave frames out.

    Args:
        path: The file.
        kind: "video" or "audio".

    Attributes:
        notes: What was wrong.
        seconds: Length of the file.
        aspect: Width of a pixel relative to its height.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kind, self.notes = path, kind, list[str]()
        self.seconds, self.aspect = 0.0, 1.0

    def __iter__(self) -> Iterator[tuple[float, float, Any]]:
        import av

        try:
            with av.open(str(self.path.resolve()), options=_SAFE, metadata_errors="ignore") as box:
                self.seconds = (box.duration or 0) / av.time_base
                streams = [x for x in getattr(box.streams, self.kind) if not _is_cover(x)]
                if streams:
                    yield from self._decoded(box, streams[0])
                else:
                    self.notes.append("no sound" if self.kind == "audio" else "no picture")
        except (av.error.FFmpegError, OSError, ValueError) as error:
            self.notes.append(f"cannot be decoded: {_first(error)}")

    def _decoded(self, box: Any, stream: Any) -> Iterator[tuple[float, float, Any]]:
        import av

        if stream.codec_context is None:
            self.notes.append("cannot be decoded: unknown or encrypted codec")
            return
        stream.codec_context.thread_count = 1  # clips are decoded in parallel
        stream.codec_context.options = {"max_pixels": str(_MOST_PIXELS)}
        start = (box.start_time or 0) / av.time_base
        following, rate, broken, cause = 0.0, 0.0, 0, ""
        if self.kind == "video":
            rate, self.aspect = stream.average_rate, float(stream.sample_aspect_ratio or 1)
        try:
            for packet in box.demux(stream):
                try:
                    frames = packet.decode()
                except av.error.FFmpegError as error:
                    broken, cause = broken + 1, _first(error)
                    continue
                for frame in frames:
                    time = following if frame.time is None else frame.time - start
                    if self.kind == "audio":
                        lasting = frame.samples / frame.sample_rate
                    elif frame.duration:
                        lasting = float(frame.duration * frame.time_base)
                    else:
                        lasting = float(1 / rate) if rate else 0.0
                    following = time + lasting
                    yield time, lasting, frame
        finally:  # also if the rest is not needed
            if broken:
                self.notes.append(f"damaged: {broken} packets ({cause})")


def _is_cover(stream: Any) -> bool:
    """Whether a stream is a picture of the cover in a file of sound."""
    import av

    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _first(error: Exception) -> str:
    """The cause without the path."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:100]


def _captions(path: Path, cut: Cut) -> tuple[list[str], Array, list[str]]:
    """T captions, which of them are valid [T], and notes."""
    if path.stat().st_size > _LARGEST_CAPTION:
        raise ValueError(f"more than {_LARGEST_CAPTION} bytes")
    T, notes = cut.segments, list[str]()
    lines = [x.strip() for x in path.read_text(encoding="utf-8-sig").splitlines()]
    if not len(lines) == T > 1:
        if len([*filter(None, lines)]) > 1:
            notes = [f"joined to one caption of the clip: {len(lines)} lines for {T} segments"]
        lines = [" ".join(filter(None, lines))] * T
    valid = np.array([bool(line) for line in lines])
    return lines, valid, notes if valid.any() else ["empty"]
