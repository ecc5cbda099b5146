"""Loaders of the released files."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cmg_pretrain
import h5py
import numpy as np
import pytest
import released_files as released
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import peak_growth

from cmg.clips import PRETRAIN, TEST, TRAIN
from cmg.errors import DataError
from cmg.released import SETS, arrays, avs, load_released, sets
from cmg.released.avs import AVSBenchS4
from cmg.released.text import with_text


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMVQ_CACHE", str(tmp_path_factory.mktemp("cache")))


def read_all(root: Path) -> list[torch.Tensor]:
    return [x[torch.arange(x.shape[0])] for x in sets.vggsound_avel(root).features.values()]


def clip(released: sets.ReleasedSet, name: str, n: int) -> torch.Tensor:
    return released.features[name][torch.tensor([n])][0]


def test_vggsound_avel(tmp_path: Path) -> None:
    rows = released.vggsound_avel(tmp_path)
    got = sets.vggsound_avel(tmp_path)
    assert got.ids == tuple(row[2] for row in rows)
    assert got.features["audio"].shape == (30, 10, 128)
    assert got.features["video"].shape == (30, 10, 7, 7, 512)
    for n in (0, 1, 3):  # 8, 9 and 11 segments of audio: repeated, and cut
        raw = arrays.read_zip(tmp_path / "audio" / "zip" / f"{rows[n][2]}.zip")
        expected = np.concatenate([raw, np.repeat(raw[-1:], 10, 0)])[:10]
        assert np.array_equal(clip(got, "audio", n), expected)
    truth = got.events["video"]
    assert truth.shape == (30, 10, 3)
    assert truth[4, :, 1].tolist() == [1, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert not truth[4, :, [0, 2]].any()
    assert [got.split[n] for n in (0, 3, 6)] == [PRETRAIN, TRAIN, TEST]


def test_clips_hide_the_labels_of_pretraining(tmp_path: Path) -> None:
    released.vggsound_avel(tmp_path)
    clips = sets.vggsound_avel(tmp_path).clips()
    hidden = clips.split == PRETRAIN
    assert (clips.labels[hidden] == -1).all()
    assert (clips.segment_labels["audio"][hidden] == -1).all()
    assert clips.labels[~hidden].tolist() == [n % 3 for n in range(30) if n // 3 % 3 != 0]
    assert clips.segment_labels["video"][4].tolist() == [1, -1, -1, 1, 1, 1, 1, 1, 1, 1]


def test_ave_follows_the_order_files(tmp_path: Path) -> None:
    labels = released.ave(tmp_path)
    got = sets.ave(tmp_path)
    assert got.ids == tuple(map(str, range(11, -1, -1)))
    assert got.split.tolist() == [PRETRAIN] * 4 + [TRAIN] * 4 + [TEST] * 4
    assert np.array_equal(got.events["audio"], labels[::-1, :, :-1])
    assert got.labels.tolist() == [n % 3 for n in range(11, -1, -1)]


def test_avvp_has_several_events_at_once(tmp_path: Path) -> None:
    released.avvp(tmp_path)
    got = sets.avvp(tmp_path)
    assert got.ids == tuple(row[0][:11] for row in released.AVVP_ROWS)
    truth = got.events["audio"]
    assert truth[0, :, 2].tolist() == [1, 0, 0, 0, 0, 1, 1, 1, 1, 0]  # Speech, twice
    assert truth[0, :, 1].tolist() == [1, 1, 1, 1, 1, 0, 1, 1, 0, 1]  # Violin, three times
    assert truth[5].any(-1).tolist() == [0, 1] + [0] * 8
    assert torch.equal(truth, got.events["video"])  # the same rows in another order
    assert set(got.split.tolist()) == {TRAIN, TEST}
    shown = got.clips().segment_labels["audio"]
    assert shown[0].tolist() == [1, 1, 1, 1, 1, 2, 1, 1, 2, 1]  # the longest event first
    assert shown[5].tolist() == [-1, 1] + [-1] * 8


def test_ave_avvp_shares_its_classes(tmp_path: Path) -> None:
    released.ave(tmp_path / "ave")
    released.avvp(tmp_path / "own", "AVE_AVVP_eval", data=".")
    released.avvp(tmp_path / "avvp")
    labels = np.zeros((12, 10, 4))
    labels[..., 0] = 1
    released.h5(tmp_path / "own" / "ave_avvp_labels.h5", "avadataset", labels)
    released.h5(tmp_path / "own" / "ave_avvp_order.h5", "order", np.array([7, 2]))
    train, test = sets.ave_avvp(tmp_path / "own", tmp_path / "ave", tmp_path / "avvp")
    assert train.categories == test.categories == released.CLASSES
    assert train.ids == ("7", "2")
    whole = sets.ave(tmp_path / "ave")
    assert torch.equal(clip(train, "video", 0), clip(whole, "video", whole.ids.index("7")))
    assert test.features["audio"].shape == (6, 10, 128)


def test_ucf_and_vggsound_are_of_the_same_classes(tmp_path: Path) -> None:
    released.ucf_vggsound(tmp_path)
    ucf, vggsound = sets.ucf_vggsound(tmp_path)
    assert set(ucf.features) == {"video"}
    assert set(vggsound.features) == {"audio"}
    assert ucf.labels.tolist() == vggsound.labels.tolist() == [0, 1, 0, 1]
    assert ucf.features["video"].shape == (4, 10, 7, 7, 512)


@pytest.mark.parametrize(("split", "masks"), [("train", 1), ("test", 5)])
def test_avsbench_s4(tmp_path: Path, split: str, masks: int) -> None:
    released.table(
        tmp_path / "s4_meta_data.csv", ("name", "split", "category"), [("vid_1", split, "dog")]
    )
    released.table(
        tmp_path / "AVSBenchCategories2Prompts.csv", ("label", "prompt"), [("dog", "a dog")]
    )
    truth = np.random.default_rng(0).random((5, 6, 8)) < 0.5
    for kind, count in (("visual_frames", 5), ("gt_masks", masks)):
        folder = tmp_path / "s4_data" / kind / split / "dog" / "vid_1"
        folder.mkdir(parents=True)
        for i in range(count):
            image = Image.fromarray((truth[i] * 255).astype(np.uint8))
            image.convert("RGB" if kind == "visual_frames" else "L").save(
                folder / f"vid_1_{i + 1}.png"
            )
    released.zip_of(
        tmp_path / f"audio/{split}/zip/dog/vid_1.zip", released.features("audio", 0, T=3)
    )
    data = AVSBenchS4(tmp_path, split)
    assert len(data) == 1
    clip = data[0]
    assert clip.frames.shape == (5, 6, 8, 3)
    assert np.array_equal(clip.masks, truth[:masks])
    assert np.array_equal(clip.frames[..., 0], truth * 255)
    assert clip.audio.shape == (5, 128)
    assert torch.equal(clip.audio[4], clip.audio[2])
    assert clip.prompt == "a dog"


def test_images_that_are_not_small_png_of_one_size_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path in paths:
        Image.new("RGB", (8, 6)).save(path)
    assert avs._images(paths, "1").shape == (2, 6, 8)
    Image.new("RGB", (8, 7)).save(paths[1])
    with pytest.raises(DataError, match=r"1\.png: must be \[6, 8\] as the first; got \[7, 8\]"):
        avs._images(paths, "1")
    content = paths[0].read_bytes()
    for i in range(0, len(content) // 2, 3):
        paths[0].write_bytes(content[:i])
        with pytest.raises(DataError, match=r"0\.png: missing, or not a png image"):
            avs._images(paths, "RGB")
    Image.new("RGB", (8, 7)).save(paths[0], format="BMP")
    with pytest.raises(DataError, match=r"0\.png: missing, or not a png image"):
        avs._images(paths, "RGB")
    monkeypatch.setattr(avs, "_PIXELS", 55)
    with pytest.raises(DataError, match=r"1\.png: must have at most 55 pixels; got \(8, 7\)"):
        avs._images(paths[1:], "RGB")


@pytest.fixture
def bert(tmp_path: Path) -> str:
    """The folder of a text encoder that knows a few words, 16 wide."""
    transformers = pytest.importorskip("transformers")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the sound of dog bark violin".split()
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def test_text_is_the_prompt_of_the_category(tmp_path: Path, bert: str) -> None:
    released.vggsound_avel(tmp_path / "set", clips=9)
    got = with_text(sets.vggsound_avel(tmp_path / "set"), bert)
    assert got.features["text"].shape == (9, 10, 16)
    text = got.features["text"][torch.arange(9)]
    assert torch.equal(text[0], text[3])  # the same category
    assert not torch.equal(text[0], text[1])
    there = text[0].abs().sum(-1) > 0
    assert there.tolist() == [True] * 5 + [False] * 5  # "the sound of dog bark"
    with pytest.raises(DataError, match="cannot be loaded"):
        with_text(got, str(tmp_path / "none"))


def test_a_model_of_three_modalities_is_tested_on_a_set_of_two(
    tmp_path: Path, bert: str, capsys: pytest.CaptureFixture[str]
) -> None:
    released.vggsound_avel(tmp_path / "vgg", clips=36)
    released.ave(tmp_path / "ave")
    data = [f"vggsound-avel:{tmp_path / 'vgg'}", "--modalities", "audio", "video", "text"]
    arguments = ["--epochs", "1", "--text-encoder", bert, "--output", str(tmp_path / "out")]
    ave = f"ave:{tmp_path / 'ave'}"
    assert cmg_pretrain.main(["--data", *data, *arguments, "--downstream", ave]) == 0
    elsewhere = json.loads((tmp_path / "out" / "downstream.json").read_text())
    assert set(elsewhere[ave]["classification"]) == {"audio->video", "video->audio"}
    here, there = capsys.readouterr().out.split(f"{ave}, without further pre-training:")
    assert "text->audio" in here
    assert "audio->video" in there
    assert "text" not in there


@pytest.mark.parametrize("preset", ["paper", "cmg-released"])
def test_the_whole_pipeline_runs_on_released_sets(tmp_path: Path, preset: str) -> None:
    released.vggsound_avel(tmp_path / "vgg", clips=36)
    released.ave(tmp_path / "ave")
    released.avvp(tmp_path / "avvp")
    others = [f"{name}:{tmp_path / name}" for name in ("ave", "avvp")]
    arguments = ["--data", f"vggsound-avel:{tmp_path / 'vgg'}", "--preset", preset, "--epochs", "1"]
    arguments += ["--output", str(tmp_path / "out"), "--downstream", *others]
    assert cmg_pretrain.main(arguments) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["dataset"] == "vggsound-avel"
    assert metrics["codebook"]["size"] == 400
    elsewhere = json.loads((tmp_path / "out" / "downstream.json").read_text())
    assert list(elsewhere) == others
    for scores in (metrics, *elsewhere.values()):
        assert set(scores["classification"]) == {"audio->video", "video->audio"}
        assert set(scores["localization"]) == {"audio->video", "video->audio"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["partner"] == {"paper": "attention", "cmg-released": "aligned"}[preset]


def test_a_modality_that_a_set_has_not_is_named(tmp_path: Path) -> None:
    released.ave(tmp_path)
    with pytest.raises(DataError, match=r"no modality 'smell'.*: audio, video\."):
        load_released("ave", str(tmp_path), ["audio", "smell"])


@pytest.mark.parametrize("kind", SETS)
def test_a_folder_that_is_not_the_set_is_told_what_the_set_has(kind: str, tmp_path: Path) -> None:
    """And a folder of the set lacks nothing of that list."""
    layout = SETS[kind][1]
    with pytest.raises(DataError, match=re.escape(f"a folder with {layout}; it lacks {layout}.")):
        load_released(kind, str(tmp_path))
    getattr(released, kind.replace("-", "_"))(tmp_path)
    assert load_released(kind, str(tmp_path)).modalities == ("audio", "video")
    first, *others = layout.split()
    (tmp_path / first).unlink()
    with pytest.raises(DataError, match=rf"{others[-1]}; it lacks {first}\.$"):
        load_released(kind, str(tmp_path))


def test_a_set_without_clips_to_pretrain_on_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    released.avvp(tmp_path)
    arguments = ["--data", f"avvp:{tmp_path}", "--output", str(tmp_path / "out")]
    assert cmg_pretrain.main(arguments) == 2
    assert "pre-training takes two clips of split 0 or more; got 0" in capsys.readouterr().err


class Payload:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("ran",))


OBJECTS: list[Any] = [
    Payload(),
    [1, 2],
    np.array([{}], object),
    np.array(["a"]),
    {"a": np.ones(3)},
    b"not a pickle",
    b"",
]


@pytest.mark.parametrize("content", OBJECTS, ids=lambda x: type(x).__name__)
def test_only_numeric_arrays_are_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    released.zip_of(tmp_path / "x.zip", content)
    with pytest.raises(DataError, match=r"x\.zip: must be a zip of one pickled numpy array"):
        arrays.read_zip(tmp_path / "x.zip")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "i8", "?"])
def test_arrays_of_every_protocol_are_read(protocol: int, dtype: str) -> None:
    array = np.arange(12).reshape(3, 4).astype(dtype)
    back = arrays.unpickle_array(io.BytesIO(pickle.dumps(array, protocol=protocol)))
    assert back.dtype == array.dtype
    assert np.array_equal(back, array)


PYTHON2 = {
    0: b"cnumpy.core.multiarray\n_reconstruct\np0\n(cnumpy\nndarray\np1\n(I0\ntp2\nS'b'\np3\ntp4\n"
    b"Rp5\n(I1\n(L3L\ntp6\ncnumpy\ndtype\np7\n(S'f4'\np8\nI0\nI1\ntp9\nRp10\n(I3\nS'<'\np11\nNNNI-1"
    b"\nI-1\nI0\ntp12\nbI00\nS'\\x00\\x00\\x80\\xbf\\x00\\x00\\x00\\x00\\x00\\x00\\x80?'\np13\ntp14\nb.",
    2: b"\x80\x02cnumpy.core.multiarray\n"
    b"_reconstruct\nq\x00cnumpy\nndarray\nq\x01K\x00\x85q\x02U\x01bq"
    b"\x03\x87q\x04Rq\x05(K\x01K\x03\x85q\x06cnumpy\ndtype\nq\x07U\x02f4q\x08K\x00K\x01\x87q\tRq\n(K"
    b"\x03U\x01<q\x0bNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0cb\x89U\x0c\x00\x00\x80\xbf\x00\x00"
    b"\x00\x00\x00\x00\x80?q\rtq\x0eb.",
}


@pytest.mark.parametrize("protocol", PYTHON2)
def test_arrays_of_python_2_are_read(protocol: int) -> None:
    back = arrays.unpickle_array(io.BytesIO(PYTHON2[protocol]))
    assert back.dtype == np.float32
    assert back.tolist() == [-1.0, 0.0, 1.0]


def test_other_orders_are_read() -> None:
    array = np.asfortranarray(np.arange(12.0).reshape(3, 4)).astype(">f8")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        back = arrays.unpickle_array(io.BytesIO(pickle.dumps(array, protocol=protocol)))
        assert back.dtype == np.float64
        assert np.array_equal(back, array)


GOOD = pickle.dumps(np.ones(3, np.float32), protocol=2)
SPOILT = {
    "an order that is two dtypes": (GOOD.replace(b"X\1\0\0\0<", b"X\3\0\0\0i4,"), "no numbers"),
    "a shape of another size": (GOOD.replace(b"K\3\x85", b"K\4\x85"), "does not fit its 12 bytes"),
    "a shape below 0": (GOOD.replace(b"K\3\x85", b"J\xff\xff\xff\xff\x85"), "is not one"),
    "a huge shape": (GOOD.replace(b"K\3\x85", b"J\xff\xff\xff\x7f\x85"), "does not fit"),
    "state of a name": (b"c_codecs\nencode\n}b.", "no EMPTY_DICT"),
    "a state of a name": (b"c_codecs\nencode\n)b.", "changes something else"),
    "many small objects": (b"]" * 4_000_000 + b".", "no EMPTY_LIST"),
    "many tuples": (b")" * 4_000_000 + b".", "at most 256 opcodes"),
    "doubling": (b")" + b"\x94h\x00h\x00\x86" * 100 + b".", "at most 256 opcodes"),
    "a name of another module": (b"cos\nsystem\n.", "asks for 'os.system'"),
    "lines in a name": (b"\x8c\x03a\nb\x8c\x01c\x93.", r"asks for 'a\\nb\.c'"),
}


@pytest.mark.parametrize(("content", "message"), SPOILT.values(), ids=SPOILT)
def test_a_pickle_that_numpy_did_not_write_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    assert content != GOOD
    released.zip_of(tmp_path / "x.zip", content)
    with pytest.raises(DataError, match=message) as error:
        arrays.read_zip(tmp_path / "x.zip")
    assert "\n" not in str(error.value)


def test_a_small_zip_takes_no_memory(tmp_path: Path) -> None:
    """64 MiB of opcodes in 64 kB; and a size in the list of the zip that the content has not."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x.pkl", b")" * 2**26)
    call = f"try: arrays.read_zip(Path({str(path)!r}))\nexcept DataError as e: said.append(e)\n"
    setup = (
        "import sys; sys.path.insert(0, 'examples'); said = []; from pathlib import Path\n"
        "from cmg.released import arrays; from cmg.errors import DataError"
    )
    assert peak_growth(setup, f"{call}assert '256 opcodes' in str(said)") < 220  # MiB: the bytes
    path.write_bytes(
        path.read_bytes().replace((2**26).to_bytes(4, "little"), b"\xff" * 3 + b"\x7f")
    )
    with pytest.raises(DataError, match="2147483647 bytes are too many"):
        arrays.read_zip(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as file:
        file.writestr("x.pkl", GOOD)
    with pytest.raises(DataError, match="must be stored or deflated"):
        arrays.read_zip(path)


@settings(max_examples=int(os.environ.get("MMVQ_FUZZ", 50)), deadline=None)
@given(st.data())
def test_damaged_pickles_raise_one_error(data: st.DataObject) -> None:
    whole = bytearray(
        pickle.dumps(np.ones((2, 3), np.float32), protocol=data.draw(st.integers(0, 5)))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        array = arrays.unpickle_array(io.BytesIO(bytes(whole)))
    except pickle.UnpicklingError:
        return
    assert array.dtype.kind in "fiub"


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no table": (lambda r: (r / "vggsound-avel40k.csv").unlink(), "cannot be read as a table"),
    "no rows": (lambda r: (r / "vggsound-avel40k.csv").write_text(""), "needs the columns"),
    "no clip": (lambda r: (r / "audio/zip/video000004.zip").unlink(), "no such file"),
    "torn zip": (lambda r: (r / "video/zip/video000002.zip").write_bytes(b"PK"), "not a zip"),
    "odd split": (
        lambda r: released.table(
            r / "vggsound-avel40k.csv",
            ("split", "category", "video_id"),
            [("x", "Violin", "video000000")],
        ),
        "split must be one of",
    ),
    "odd class": (
        lambda r: (r / "VggsoundAVEL40kCategories.txt").write_text("Violin"),
        "is not in the list",
    ),
    "twice": (
        lambda r: (r / "VggsoundAVEL40kCategories.txt").write_text("Violin\nViolin"),
        "each category once",
    ),
    "shape": (
        lambda r: released.zip_of(r / "audio/zip/video000000.zip", np.ones((10, 3))),
        "audio must be",
    ),
    "empty": (
        lambda r: released.zip_of(r / "audio/zip/video000000.zip", np.ones((0, 128))),
        "audio must be",
    ),
    "NaN": (
        lambda r: released.zip_of(r / "audio/zip/video000000.zip", np.full((10, 128), np.nan)),
        "must be finite",
    ),
    "label": (
        lambda r: released.zip_of(r / "label/zip/video000000.zip", np.ones(9)),
        "must be \\[10\\]",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    released.vggsound_avel(tmp_path, clips=9)
    damage, message = DAMAGE[name]
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        read_all(tmp_path)


def test_hdf5_that_does_not_fit_is_named(tmp_path: Path) -> None:
    released.ave(tmp_path)
    (tmp_path / "val_order.h5").write_bytes(b"")
    with pytest.raises(DataError, match=r"val_order\.h5: missing, damaged, or not HDF5"):
        sets.ave(tmp_path)
    released.h5(tmp_path / "val_order.h5", "other", np.arange(2))
    with pytest.raises(DataError, match="no array 'order'"):
        sets.ave(tmp_path)
    released.h5(tmp_path / "val_order.h5", "order", np.array([99]))
    with pytest.raises(DataError, match=r"labels\.h5: must be"):
        sets.ave(tmp_path)


def linked(file: h5py.File, other: Path) -> None:
    file["here"] = np.ones(3)
    file["order"] = h5py.SoftLink("/here")


def virtual(file: h5py.File, other: Path) -> None:
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource(str(other), "order", (3,))
    file.create_virtual_dataset("order", layout)


ORDERS: dict[str, tuple[Callable[[h5py.File, Path], object], str]] = {
    "a soft link": (linked, "no array 'order', but SoftLink"),
    "a link to a file": (
        lambda file, other: file.__setitem__("order", h5py.ExternalLink(str(other), "order")),
        "no array 'order', but ExternalLink",
    ),
    "another file's array": (virtual, "must be in this file"),
    "another file's bytes": (
        lambda file, other: file.create_dataset("order", (10,), "i1", external=[(other, 0, 10)]),
        "must be in this file",
    ),
    "nothing stored": (
        lambda file, other: file.create_dataset("order", (10**6, 1350), "f4", chunks=(10, 1350)),
        "takes 5400000000 bytes, but only 0 are stored",
    ),
    "a group": (lambda file, other: file.create_group("order"), "but Group"),
    "text": (lambda file, other: file.create_dataset("order", data=[b"a"]), "must be of numbers"),
    "a number": (lambda file, other: file.create_dataset("order", data=3), r"order\.h5: .*read"),
    "below 0": (lambda file, other: file.create_dataset("order", data=[-1]), "numbers of clips"),
    "NaN": (lambda file, other: file.create_dataset("order", data=[np.nan]), "numbers of clips"),
    "no clip": (
        lambda file, other: file.create_dataset("order", data=np.ones(0)),
        "takes 8 bytes, but only 0 are stored|numbers of clips",
    ),
}


@pytest.mark.parametrize(("make", "message"), ORDERS.values(), ids=ORDERS)
def test_hdf5_that_reads_elsewhere_or_claims_more_is_refused(
    tmp_path: Path, make: Callable[[h5py.File, Path], object], message: str
) -> None:
    released.ave(tmp_path)
    with h5py.File(tmp_path / "val_order.h5", "w") as file:
        make(file, tmp_path / "train_order.h5")
    with pytest.raises(DataError, match=message) as error:
        sets.ave(tmp_path)
    assert "\n" not in str(error.value)


def test_hdf5_with_deflated_zeros_is_read(tmp_path: Path) -> None:
    """The most that deflate can save."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        chunks = {"chunks": (1, 10**6), "compression": "gzip", "compression_opts": 9}
        file.create_dataset("x", data=np.zeros((3, 10**6)), **chunks)
    assert (tmp_path / "x.h5").stat().st_size < 30_000
    assert not arrays.read_h5(tmp_path / "x.h5", "x")[:].any()


def test_damaged_parts_of_hdf5_are_named_when_read(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=np.arange(1000), compression="gzip", chunks=(1000,))
        chunk = file["x"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + 20] = bytes(20)
    path.write_bytes(content)
    found = arrays.read_h5(path, "x")
    with pytest.raises(DataError, match=r"x\.h5: \[3\] cannot be read"):
        found[3]


@pytest.mark.parametrize(("field", "value"), [(2, "x"), (3, "1,2"), (1, "Cat")])
def test_odd_rows_of_avvp_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: int, value: str
) -> None:
    row = list(released.AVVP_ROWS[1])
    row[field] = value
    monkeypatch.setattr(released, "AVVP_ROWS", (*released.AVVP_ROWS[2:], tuple(row)))
    released.avvp(tmp_path)
    with pytest.raises(DataError, match=r"comma-separated lists|not in the list"):
        sets.avvp(tmp_path)
