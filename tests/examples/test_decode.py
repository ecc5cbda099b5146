"""Decoding of real files: time stamps, faults, other formats, and what is refused."""

from __future__ import annotations

import os
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from media_files import beeps, captions, film, grey, left_bright, plain, turned

from cmg.errors import DataError
from cmg.media import decode as decoding
from cmg.media.decode import Cut, Decoded, decode
from cmg.media.folder import is_media_folder, open_folder

T = 4
CUT = Cut(segments=T, seconds=4, frames=2, size=32, rate=16_000, captions=True)


def decoded(folder: Path, name: str, cut: Cut = CUT) -> Decoded:
    (source,) = (x for x in open_folder(folder).sources if x.id == name)
    return decode(source, cut)


def brightness(clip: Decoded) -> np.ndarray:
    """Of the middle of every frame, [T, F]."""
    return clip.frames[:, :, 12:20, 12:20].mean((2, 3, 4))


def loudness(clip: Decoded) -> np.ndarray:
    """Root mean square of the middle of every segment, [T]."""
    quarter = clip.sound.shape[1] // 4
    return np.sqrt((clip.sound[:, quarter:-quarter] ** 2).mean(1))


def is_right(clip: Decoded, segments: int = T) -> None:
    """The picture and the sound of the first segments are those of their second."""
    expected = np.array([grey(k) for k in range(segments)])
    np.testing.assert_allclose(brightness(clip)[:segments], expected[:, None] + [0, 0], atol=4)
    heard = loudness(clip)[:segments]
    np.testing.assert_allclose(heard, [0.35 * (k % 2) for k in range(segments)], atol=0.06)
    for name in ("video", "audio"):
        assert clip.valid[name].tolist() == [k < segments for k in range(T)], name


def notes(clip: Decoded, modality: str) -> list[str]:
    return [text for name, text in clip.notes if name == modality]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp4", {}),
        ("a.mkv", {"codecs": ("libx264", "libopus"), "rate": 48_000}),
        ("a.webm", {"codecs": ("libvpx-vp9", "libopus"), "rate": 48_000}),
        ("a.avi", {"codecs": ("mpeg4", "libmp3lame"), "rate": 44_100}),
        ("a.mov", {"codecs": ("mpeg4", "pcm_s16le"), "rate": 8_000}),
        ("a.mp4", {"rate": 44_100, "layout": "stereo"}),
        ("a.mp4", {"rate": 48_000, "layout": "5.1"}),
        ("a.mp4", {"fps": 25, "drop": lambda k: k % 7 in (1, 2, 3, 5)}),
        ("a.mp4", {"fps": 1}),
        ("a.mp4", {"shown": lambda time: plain(time, 50, 130)}),
    ],
    ids="mp4 mkv webm avi mov stereo surround variable-rate one-frame-a-second upright".split(),
)
def test_segments_show_and_sound_their_seconds(
    tmp_path: Path, name: str, options: dict[str, object]
) -> None:
    rate = options.get("rate", 16_000)
    film(tmp_path / "clips" / name, sound=beeps(4, rate), **options)
    clip = decoded(tmp_path, "a")
    is_right(clip)
    assert notes(clip, "video") == notes(clip, "audio") == []
    assert clip.frames.dtype == np.uint8
    assert clip.sound.dtype == np.float32


def test_sound_beside_the_video_takes_the_place_of_the_sound_in_it(tmp_path: Path) -> None:
    film(tmp_path / "video" / "a.mp4", sound=np.zeros(64_000, np.float32) + 0.3)
    film(tmp_path / "audio" / "a.wav", 0, sound=beeps(4), codecs=("", "pcm_s16le"))
    film(tmp_path / "audio" / "b.flac", 0, sound=beeps(4), codecs=("", "flac"))
    is_right(decoded(tmp_path, "a"))
    alone = decoded(tmp_path, "b")
    assert alone.valid["audio"].all()
    assert not alone.valid["video"].any()
    assert notes(alone, "video") == ["no file"]


def test_a_stream_that_begins_later_stays_in_time(tmp_path: Path) -> None:
    film(tmp_path / "a.mkv", sound=beeps(4)[16_000:], late=1.0, codecs=("libx264", "flac"))
    clip = decoded(tmp_path, "a")
    assert clip.valid["audio"].tolist() == [False, True, True, True]
    assert loudness(clip) == pytest.approx([0, 0.35, 0, 0.35], abs=0.06)
    assert notes(clip, "audio") == ["shorter than the clip: sound in 3 of 4 segments"]


def test_a_picture_that_begins_late_is_its_first_frame_before(tmp_path: Path) -> None:
    film(tmp_path / "a.mkv", drop=lambda k: k < 4, sound=beeps(4), codecs=("libx264", "flac"))
    is_right(decoded(tmp_path, "a"))  # the first of two frames of the first segment is missing
    film(tmp_path / "b.mkv", drop=lambda k: k < 14, sound=beeps(4), codecs=("libx264", "flac"))
    clip = decoded(tmp_path, "b")
    assert clip.valid["video"].tolist() == [False, True, True, True]
    assert notes(clip, "video") == ["shorter than the clip: picture in 3 of 4 segments"]


def test_more_channels_than_a_layout_names(tmp_path: Path) -> None:
    path = tmp_path / "audio" / "a.wav"
    path.parent.mkdir()
    with wave.open(str(path), "wb") as file:
        file.setparams((12, 2, 16_000, 0, "NONE", None))
        file.writeframes((beeps(4)[:, None].repeat(12, 1) * 32767).astype("<i2").tobytes())
    clip = decoded(tmp_path, "a")
    assert loudness(clip) == pytest.approx([0, 0.35, 0, 0.35], abs=0.02)


def test_a_gap_in_the_time_stamps_of_sound_moves_nothing(tmp_path: Path) -> None:
    import av

    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as box:
        stream = box.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for second in (0, 1, 3):  # the third is missing
            block = beeps(4)[second * 16_000 : (second + 1) * 16_000]
            frame = av.AudioFrame.from_ndarray(
                (block[None] * 32767).astype(np.int16), format="s16", layout="mono"
            )
            frame.sample_rate, frame.pts = 16_000, second * 16_000
            box.mux(stream.encode(frame))
        box.mux(stream.encode())
    clip = decoded(tmp_path, "a")
    assert clip.valid["audio"].tolist() == [True, True, False, True]
    assert loudness(clip) == pytest.approx([0, 0.35, 0, 0.35], abs=0.02)


def test_a_turned_picture_is_upright_and_pixels_are_square(tmp_path: Path) -> None:
    turned(film(tmp_path / "turned.mp4", shown=left_bright))
    frames = decoded(tmp_path, "turned").frames[:, :, :, :, 0].astype(int)
    assert frames[:, :, :12].min() > 200  # clockwise: left becomes top
    assert frames[:, :, -12:].max() < 50
    # 64 x 48 pixels twice as wide as high are 128 x 48: the centre shows half of either side
    film(tmp_path / "wide.mp4", shown=left_bright, aspect=Fraction(2))
    frames = decoded(tmp_path, "wide").frames[:, :, :, :, 0].astype(int)
    assert frames[..., :12].min() > 200
    assert frames[..., -12:].max() < 50


@pytest.mark.parametrize("size", [(16, 400), (400, 16), (2, 2)])
def test_odd_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    film(tmp_path / "a.mp4", shown=lambda time: plain(time, *size))
    assert brightness(decoded(tmp_path, "a"))[:, 0] == pytest.approx([20, 45, 70, 95], abs=4)


def test_short_and_long_clips(tmp_path: Path) -> None:
    film(tmp_path / "short.mp4", 2.2, sound=beeps(2.2))
    clip = decoded(tmp_path, "short")
    is_right(clip, 2)
    assert notes(clip, "video") == ["shorter than the clip: picture in 2 of 4 segments"]
    assert notes(clip, "audio") == ["shorter than the clip: sound in 2 of 4 segments"]
    film(tmp_path / "long.mp4", 7, sound=beeps(7))
    clip = decoded(tmp_path, "long")
    is_right(clip)
    assert notes(clip, "video") == ["longer than the clip: only the first 4 of 7.0 s are used"]
    film(tmp_path / "about.mp4", 3.9, sound=beeps(3.9))
    is_right(decoded(tmp_path, "about"))


def test_many_frames_of_a_segment_that_ends_a_little_early(tmp_path: Path) -> None:
    film(tmp_path / "a.mp4", 3.7)
    clip = decoded(tmp_path, "a", CUT._replace(frames=16))
    assert clip.valid["video"].all()
    assert clip.frames[3, :, 16, 16, 0] == pytest.approx(grey(3), abs=4)  # the last is repeated


def test_silence_and_missing_streams_are_not_valid(tmp_path: Path) -> None:
    film(tmp_path / "silent.mp4", sound=np.zeros(64_000, np.float32))
    film(tmp_path / "mute.mp4")
    film(tmp_path / "blind.mp4", 0, sound=beeps(4))
    for name, modality, text in (
        ("silent", "audio", "silent"),
        ("mute", "audio", "no sound"),
        ("blind", "video", "no picture"),
    ):
        clip = decoded(tmp_path, name)
        assert not clip.valid[modality].any()
        assert notes(clip, modality) == [text]
        assert clip.valid["audio" if modality == "video" else "video"].all()


def test_a_cover_is_no_picture(tmp_path: Path) -> None:
    import av

    path = tmp_path / "audio" / "a.mp3"
    path.parent.mkdir()
    with av.open(str(path), "w") as box:
        cover = box.add_stream("png")
        cover.width, cover.height, cover.pix_fmt = 64, 48, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        sound = box.add_stream("libmp3lame", rate=16_000, layout="mono")
        box.mux(cover.encode(av.VideoFrame.from_ndarray(plain(0), format="rgb24")))
        for start in range(0, 64_000, 1152):
            block = beeps(4)[None, start : start + 1152]
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16_000, start
            box.mux(sound.encode(frame))
        box.mux(sound.encode())
    path.rename(tmp_path / "a.mp4")  # what is in it counts
    clip = decoded(tmp_path, "a")
    assert notes(clip, "video") == ["no picture"]
    assert clip.valid["audio"].all()


def test_samples_that_are_nan_are_left_out(tmp_path: Path) -> None:
    sound = beeps(4)
    sound[40_000:48_000] = np.nan
    film(tmp_path / "audio" / "a.wav", 0, sound=sound, codecs=("", "pcm_f32le"))
    clip = decoded(tmp_path, "a")
    assert np.isfinite(clip.sound).all()
    assert "has samples that are NaN or Inf" in notes(clip, "audio")


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_damaged_bytes_give_what_can_be_decoded(tmp_path: Path, place: float) -> None:
    film(tmp_path / "a.mkv", sound=beeps(4), codecs=("libx264", "aac"))
    content = bytearray((tmp_path / "a.mkv").read_bytes())
    begin = round(place * len(content))
    content[begin : begin + 400] = np.random.default_rng(0).bytes(400)
    (tmp_path / "a.mkv").write_bytes(content)
    clip = decoded(tmp_path, "a")
    assert clip.valid["video"].sum() >= 1
    (tmp_path / "a.mkv").write_bytes(content[: len(content) // 2])  # cut short
    clip = decoded(tmp_path, "a")
    assert 1 <= clip.valid["video"].sum() < T
    assert "picture in" in notes(clip, "video")[-1]


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\x00\x00\x00\x18ftypmp42" + bytes(100), b"RIFF\xff\xff\xff\xffWAVEfmt "],
)
def test_files_that_are_none_are_noted(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    clip = decoded(tmp_path, "a")
    assert not clip.valid["video"].any()
    assert not clip.valid["audio"].any()
    assert "cannot be decoded" in notes(clip, "video")[0]


@pytest.mark.parametrize(
    "content",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{target}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{target}'\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\nc=IN IP4 127.0.0.1\n",
    ],
)
def test_a_file_that_names_other_files_opens_none(tmp_path: Path, content: str) -> None:
    target = film(tmp_path / "hidden" / "secret.mp4")
    (tmp_path / "a.mp4").write_text(content.format(target=target))
    clip = decoded(tmp_path, "a")
    assert not clip.valid["video"].any()
    assert "cannot be decoded" in notes(clip, "video")[0]


def test_frames_that_are_too_large_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film(tmp_path / "a.mp4", sound=beeps(4))
    monkeypatch.setattr(decoding, "_MOST_PIXELS", 64 * 48 - 1)
    clip = decoded(tmp_path, "a")
    assert not clip.valid["video"].any()
    assert clip.valid["audio"].all()
    assert notes(clip, "video")
    monkeypatch.undo()
    is_right(decoded(tmp_path, "a"))


def test_captions(tmp_path: Path) -> None:
    film(tmp_path / "a.mp4")
    expected = {
        "lines": (["a dog", "", "two dogs", "nothing"], ["a dog", "", "two dogs", "nothing"], []),
        "one": (["a dog barks"], ["a dog barks"] * 4, []),
        "blank": (["", " "], [""] * 4, ["empty"]),
        "more": (
            ["a", "b", "", "c", "d"],
            ["a b c d"] * 4,
            ["joined to one caption of the clip: 5 lines for 4 segments"],
        ),
    }
    for name, (given, _, _) in expected.items():
        film(tmp_path / f"{name}.mp4", 0.2)
        captions(tmp_path, name, given)
    for name, (_, lines, found) in expected.items():
        clip = decoded(tmp_path, name)
        assert clip.captions == lines
        assert clip.valid["text"].tolist() == [bool(x) for x in lines]
        assert [x.split(";")[0] for x in notes(clip, "text")] == found
    assert notes(decoded(tmp_path, "a"), "text") == ["no file"]
    (tmp_path / "captions" / "a.txt").write_bytes(b"\xff\xfe\xfa")
    assert "cannot be decoded" in notes(decoded(tmp_path, "a"), "text")[0]


class TestFolder:
    def touch(self, folder: Path, *names: str) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")

    def table(self, folder: Path, *lines: str) -> None:
        (folder / "clips.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")

    def test_files_and_ids(self, tmp_path: Path) -> None:
        self.touch(tmp_path, "clips/b.MP4", "clips/dog/1.mkv", "c.webm", "video/d.mp4")
        self.touch(tmp_path, "audio/d.wav", "audio/e.mp3", "captions/b.txt", "captions/z.txt")
        self.touch(tmp_path, "clips/.hidden.mp4", "clips/.git/x.mp4", "clips/readme.md")
        found = open_folder(tmp_path)
        assert [x.id for x in found.sources] == ["b", "c", "d", "dog/1", "e", "z"]
        by_id = {x.id: x for x in found.sources}
        assert by_id["b"].picture == by_id["b"].sound == tmp_path / "clips/b.MP4"
        assert by_id["b"].captions == tmp_path / "captions/b.txt"
        assert by_id["d"].sound == tmp_path / "audio/d.wav"
        assert by_id["e"].picture is None
        assert found.notes == (
            ("clips/readme.md", "clips", "not read: an unknown kind of file here"),
        )
        assert by_id["z"].picture is by_id["z"].sound is None
        assert {x.split for x in found.sources} == {0}

    def test_files_that_are_not_read_are_noted(self, tmp_path: Path) -> None:
        self.touch(tmp_path, "clips/a.mp4", "clips/b.wav", "notes.txt", "elsewhere/c.mp4")
        (tmp_path / "clips" / "folder").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "clips" / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
        os.mkfifo(tmp_path / "clips" / "pipe.mp4")
        (tmp_path / os.fsdecode(b"clips/caf\xe9.mp4")).write_bytes(b"x")
        found = open_folder(tmp_path)
        assert [x.id for x in found.sources] == ["a"]
        names = ["b.wav", "caf\\udce9.mp4", "folder", "gone.mp4", "pipe.mp4"]
        assert sorted(x for x, _, _ in found.notes) == [f"clips/{x}" for x in names]

    def test_labels_and_splits(self, tmp_path: Path) -> None:
        self.touch(tmp_path, *(f"{x}.mp4" for x in "abcdef"))
        self.table(
            tmp_path, "split, id ,label,year", "pretrain,a,,1", "1,b,Dog,2", "test,c.mp4,cat,3",
            "Validation,d,Dog,4", "0,e,cat,5", "train,gone,cat,6",
        )  # fmt: skip
        found = open_folder(tmp_path)
        assert [(x.label, x.split) for x in found.sources] == [
            ("", 0), ("Dog", 1), ("cat", 2), ("Dog", 3), ("cat", 0), ("", 0),
        ]  # fmt: skip
        assert found.class_names == ("Dog", "cat")
        assert found.notes == (("gone", "clips.csv", "has no file"),)

    def test_numbers_as_labels_keep_their_order(self, tmp_path: Path) -> None:
        self.touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
        self.table(tmp_path, "id,label", "a,10", "b,9", "c,2")
        assert open_folder(tmp_path).class_names == ("2", "9", "10")

    def test_without_splits_clips_of_each_class_are_divided(self, tmp_path: Path) -> None:
        ids = [f"{x}{k}" for x in "pq" for k in range(8)] + ["r0", "r1", "u"]
        self.touch(tmp_path, *(f"{x}.mp4" for x in ids))
        self.table(tmp_path, "id,label", *(f"{x},{x[0]}" for x in ids if x != "u"))
        found = {x.id: x.split for x in open_folder(tmp_path).sources}
        for name in "pq":
            splits = sorted(split for x, split in found.items() if x[0] == name)
            assert splits == [0, 0, 0, 0, 1, 1, 2, 2]
        assert sorted([found["r0"], found["r1"]]) == [1, 2]
        assert found["u"] == 0
        self.touch(tmp_path, "another.mp4")  # moves none of them
        assert {x.id: x.split for x in open_folder(tmp_path).sources} == {**found, "another": 0}

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (["name,label", "a,x"], "must have a column id; got name, label"),
            ([""], "must have a column id; got an empty file"),
            (["id,label,label", "a,x,y"], "must have each column once; got id, label, label"),
            (["id,label,split", "a,x,dev"], "line 2: split must be pretrain, train, test or"),
            (["id,label,split", "a,,train"], "a has no label. Hint: only clips of pretrain may"),
            (["id", "a", "a"], "a is listed twice"),
            (["id,label", "a,x,y"], "line 2: must have an id and 2 columns"),
            (["id,label", ",x"], "line 2: must have an id"),
            (["id,label", 'a,"x\x07"'], "the label must be printable"),
        ],
    )
    def test_tables_that_are_wrong(self, tmp_path: Path, lines: list[str], message: str) -> None:
        self.touch(tmp_path, "a.mp4")
        self.table(tmp_path, *lines)
        with pytest.raises(DataError, match=message):
            open_folder(tmp_path)

    def test_too_many_classes_are_refused_at_once(self, tmp_path: Path) -> None:
        self.touch(tmp_path, *(f"{k}.mp4" for k in range(4097)))
        self.table(tmp_path, "id,label", *(f"{k},{k}" for k in range(4097)))
        with pytest.raises(DataError, match="has 4097 labels, at most 4096 are allowed"):
            open_folder(tmp_path)

    def test_folders_that_are_wrong(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="has no media files"):
            open_folder(tmp_path)
        self.touch(tmp_path, "clips/a.mp4", "video/a.mkv")
        with pytest.raises(DataError, match=r"clips/a\.mp4 and video/a\.mkv have"):
            open_folder(tmp_path)

    def test_what_is_a_folder_of_media(self, tmp_path: Path) -> None:
        assert not is_media_folder(tmp_path / "none")
        self.touch(tmp_path, "audio/a.wav")
        assert is_media_folder(tmp_path)
        self.touch(tmp_path, "audio.npy")
        assert not is_media_folder(tmp_path)


def test_an_unknown_or_encrypted_codec_is_noted(tmp_path: Path) -> None:
    path = film(tmp_path / "clips/a.mp4", 2, sound=beeps(2))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"encv"))
    (source,) = open_folder(tmp_path).sources
    clip = decode(source, Cut(2, 2.0, 1, 32, 16_000, False))
    assert not clip.valid["video"].any()
    assert clip.valid["audio"].all()
    assert clip.notes == [("video", "cannot be decoded: unknown or encrypted codec")]
