"""The use of a trained run: tokens, classes, Parquet, the Hub, ONNX, and runs without labels."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cmg_diagnose
import cmg_encode
import cmg_pretrain
import numpy as np
import pytest
import torch
from examples.conftest import Arrays, N, T, before_call, interrupt, make_arrays
from support import once
from torch import Tensor

from cmg import token_table
from cmg.checkpoint import load_model, save_model
from cmg.clips import BACKGROUND, Clips
from cmg.containers import CLIPS_AT_ONCE
from cmg.data import load_clips
from cmg.errors import DataError
from cmg.evaluation import evaluate
from cmg.model import UniCode
from cmg.report import codebook_summary
from cmg.trained import TrainedModel

NAMES = ("audio", "video", "text")
META = {
    "modalities": NAMES,
    "encoders": {"audio": "ears", "video": "eyes"},
    "class_names": ["dog", "owl", "cat"],
    "seconds": 8,
}


def write(folder: Path, arrays: Arrays, meta: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    if meta is not None:
        (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def features_of(arrays: Arrays) -> Arrays:
    return {name: arrays[name] for name in NAMES}


def train(data: Path, output: Path, epochs: int = 16) -> None:
    arguments = ["--data", str(data), "--output", str(output), "--epochs", str(epochs)]
    assert cmg_pretrain.main(arguments) == 0


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with "store", whose video is masked in places, and "run", trained on it."""

    def make(at: Path) -> None:
        arrays = make_arrays()
        mask = np.random.default_rng(1).random((N, T)) < 0.8
        mask[::9] = False
        arrays["video"][~mask] = np.nan
        ids = {"ids": np.array([f"clip {n}" for n in range(N)])}
        train(write(at / "store", arrays | {"mask_video": mask} | ids, META), at / "run")

    return once(tmp_path_factory, "use", make)


@pytest.fixture(scope="session")
def stored(folder: Path) -> Clips:
    return load_clips(folder / "store")


@pytest.fixture
def model(folder: Path) -> TrainedModel:
    return UniCode.from_pretrained(folder / "run")


def drawn(name: str, n: int, segments: int, seed: int = 0) -> Tensor:
    shape = {"audio": (12,), "video": (2, 2, 6), "text": (9,)}[name]
    return torch.randn(n, segments, *shape, generator=torch.Generator().manual_seed(seed))


def test_a_run_is_one_object(folder: Path, model: TrainedModel) -> None:
    assert model.about.encoders == META["encoders"]
    assert model.about.class_names == ("dog", "owl", "cat")
    assert model.about.seconds == 8
    assert [model.grid(name) for name in NAMES] == [(), (2, 2), ()]
    assert [*model.heads.clips] == [*model.heads.segments] == [*NAMES]
    assert not model.training
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    config = json.loads((folder / "run" / "config.json").read_text())
    assert load_model(folder / "run")[1] == config
    assert config["data"]["seconds"] == 8


def test_the_scores_of_the_run_are_found_again(
    folder: Path, stored: Clips, model: TrainedModel
) -> None:
    """With the tokens and the heads of the loaded model, without training anything."""
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    tokens = model.tokens(stored.features, stored.masks)
    size = len(model.codebook)
    found = evaluate(model.vectors(tokens), tokens, stored, size, model.heads)
    for task, ways in found.items():
        for way, scores in ways.items():
            assert scores == pytest.approx(metrics[task][way], abs=1e-6)
    held_out = {name: i[stored.rows(2)] for name, i in tokens.items()}
    assert codebook_summary(held_out, size) == metrics["codebook"]


@pytest.mark.parametrize(("n", "segments"), [(1, 1), (3, 13), (101, 4), (0, 4), (7, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_any_clips_of_one_modality(model: TrainedModel, name: str, n: int, segments: int) -> None:
    x = drawn(name, n, segments, seed=n)
    (tokens,) = model.tokens({name: x}).values()
    assert (tokens.shape, tokens.dtype) == ((n, segments), torch.int64)
    assert ((tokens >= 0) & (tokens < len(model.codebook))).all()
    vectors = model.vectors({name: tokens})[name]
    assert torch.equal(vectors, model.codebook[tokens])
    prediction = model.classify({name: x}, labels_from="text")[name]
    assert prediction.label.shape == (n,)
    assert (prediction.probability >= 1 / 3).all()
    assert model.localize({name: x}, labels_from="text")[name].label.shape == (n, segments)
    if n:
        alone = model.tokens({name: x[-1:]})[name]
        assert (alone == tokens[-1:]).float().mean() > 0.9  # but for near ties


class Lazy:
    """Features that note how many clips are read at a time."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.shape, self.read = x, x.shape, [0]

    def __getitem__(self, rows: Tensor) -> Tensor:
        self.read.append(len(rows))
        return self.x[rows]


def test_features_of_any_kind(model: TrainedModel) -> None:
    x = drawn("audio", 210, 5)
    expected = model.tokens({"audio": x})["audio"]
    lazy = Lazy(x)
    for other in (x.double(), x.numpy(), x.double().numpy(), lazy, x.mT.contiguous().mT):
        assert torch.equal(model.tokens({"audio": other})["audio"], expected)
    assert max(lazy.read) <= 100
    half = model.tokens({"audio": x.half()})["audio"]
    assert (half == expected).float().mean() > 0.95
    model.train()  # has no effect on results
    assert torch.equal(model.tokens({"audio": x})["audio"], expected)


def test_what_is_not_valid_has_no_influence(model: TrainedModel) -> None:
    x = {name: drawn(name, 6, 5) for name in NAMES}
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[2] = False
    spoilt = x | {"video": torch.where(mask[..., None, None, None], x["video"], torch.nan)}
    one, two = (model.tokens(v, {"video": mask}) for v in (x, spoilt))
    assert torch.equal(one["video"], two["video"])
    assert torch.equal(one["video"] < 0, ~mask)
    assert (one["audio"] >= 0).all()
    assert (model.vectors(one)["video"][~mask] == 0).all()
    found = model.classify(spoilt, labels_from="audio", masks={"video": mask})["video"]
    assert (found.label[2], found.probability[2]) == (-1, 0)
    assert model.class_name(-1) == "-1"
    assert (found.label >= 0).sum() == 5
    segments = model.localize(spoilt, labels_from="audio", masks={"video": mask})["video"]
    assert (segments.label[~mask] == BACKGROUND).all()
    assert (segments.probability[~mask] == 0).all()
    of_numpy = model.tokens(spoilt, {"video": mask.numpy()})
    assert torch.equal(of_numpy["video"], one["video"])
    short = {"video": x["video"][:1, :3]}
    padded = model.tokens({"video": x["video"][:1]}, {"video": torch.arange(5)[None] < 3})
    assert torch.equal(model.tokens(short)["video"], padded["video"][:, :3])


def test_classes_of_other_clips_by_labels_of_another_modality(model: TrainedModel) -> None:
    """Each modality of the data maps the same events; the data of another draw are other clips."""
    arrays = make_arrays()
    x = {m: torch.from_numpy(arrays[m][60:]).float() for m in NAMES}
    truth = torch.from_numpy(arrays["labels"][60:])
    for name, found in model.classify(x, labels_from="audio").items():
        assert (found.label == truth).float().mean() > 0.7, name
    (label, *_) = model.classify(x, labels_from="audio")["video"].label.tolist()
    assert model.class_name(label) in META["class_names"]
    shown = torch.from_numpy(arrays["seg_labels_text"][60:])
    found = model.localize(x, labels_from="audio")["text"]
    assert (found.label == shown).float().mean() > 0.7


ERRORS: list[tuple[dict[str, Any], dict[str, Any] | None, str]] = [
    ({"smell": torch.zeros(2, 3, 4)}, None, "takes audio, video, text; got 'smell'"),
    ({"audio": torch.zeros(2, 3, 11)}, None, r"audio float \[N, T, 12\]; got .*\[2, 3, 11\]"),
    ({"audio": torch.zeros(2, 12)}, None, r"audio float \[N, T, 12\]"),
    ({"audio": torch.zeros(2, 0, 12)}, None, r"got float32\[2, 0, 12\]"),
    ({"audio": torch.zeros(2, 3, 12).long()}, None, r"got int64\[2, 3, 12\]"),
    ({"video": torch.zeros(2, 3, 3, 2, 6)}, None, r"video float \[N, T, 2, 2, 6\]"),
    ({"video": torch.zeros(2, 3, 6)}, None, r"video float \[N, T, 2, 2, 6\]"),
    ({"audio": torch.full((2, 3, 12), np.nan)}, None, "audio: must be finite; got .* clip 0"),
    ({"audio": torch.full((2, 3, 12), 1e300, dtype=torch.double)}, None, "audio: must be finite"),
    (
        {"audio": torch.zeros(2, 3, 12)},
        {"audio": torch.ones(2, 4).bool()},
        r"mask of audio: must be bool \[2, 3\]; got bool\[2, 4\]",
    ),
    ({"audio": torch.zeros(2, 3, 12)}, {"audio": torch.ones(2, 3)}, "mask of audio: must be bool"),
]


@pytest.mark.parametrize(("features", "masks", "message"), ERRORS)
def test_what_does_not_fit_is_named(
    model: TrainedModel, features: Any, masks: Any, message: str
) -> None:
    for use in (model.tokens, model.semantic_features):
        with pytest.raises(DataError, match=message) as error:
            use(features, masks)
        assert "\n" not in str(error.value)


def test_a_classifier_that_there_is_not(model: TrainedModel) -> None:
    with pytest.raises(DataError, match=r"clips from labels of audio, video, text; got 'smell'"):
        model.classify({"audio": drawn("audio", 1, 2)}, labels_from="smell")


def saved_again(folder: Path, to: Path, change: Callable[[dict[str, Tensor], Any], object]) -> Path:
    tensors, config = load_model(folder / "run")
    change(tensors, config)
    save_model(to, tensors, config)
    return to


def as_before(tensors: dict[str, Tensor], config: Any) -> None:
    """What earlier versions saved."""
    del config["data"]
    for name in [*tensors]:
        if name.startswith("heads/"):
            del tensors[name]


def test_a_run_of_an_earlier_version(folder: Path, model: TrainedModel, tmp_path: Path) -> None:
    old = UniCode.from_pretrained(saved_again(folder, tmp_path, as_before))
    x = {name: drawn(name, 3, 4) for name in NAMES}
    for name, tokens in old.tokens(x).items():
        assert torch.equal(tokens, model.tokens(x)[name])
    assert old.class_name(2) == "2"
    assert old.grid("video") == (4,)
    for use in (old.classify, old.localize):
        with pytest.raises(DataError, match=r"has no classifiers of .*trained by an earlier"):
            use(x, labels_from="audio")


def put(name: str, value: Any) -> Callable[[dict[str, Tensor], Any], object]:
    return lambda tensors, config: tensors.update({name: value})


def about(**values: Any) -> Callable[[dict[str, Tensor], Any], object]:
    return lambda tensors, config: config["data"].update(values)


HEAD = "heads/clips/audio"
DAMAGES: list[Callable[[dict[str, Tensor], Any], object]] = [
    put(f"{HEAD}/weight", torch.zeros(3, 5).double()),
    put(f"{HEAD}/scale", torch.tensor([1.0]).double()),
    put(f"{HEAD}/bias", torch.tensor([0.0, 1.0, torch.nan]).double()),
    put(f"{HEAD}/classes", torch.tensor([0, 2, 1])),
    put(f"{HEAD}/classes", torch.tensor([-1, 0, 1])),
    put(f"{HEAD}/classes", torch.tensor([0, 1, 3])),  # of three names
    put(f"{HEAD}/classes", torch.zeros(0).long()),
    put(f"{HEAD}/more", torch.zeros(2)),
    lambda tensors, config: tensors.pop(f"{HEAD}/mean"),
    lambda tensors, config: tensors.pop("standardizer/mean/text"),
    put("standardizer/mean/smell", torch.zeros(3)),
    about(grids={"video": [3, 2]}),
    about(grids={"video": 4}),
    about(grids={"video": [-2, -2]}),
    about(class_names=[1, 2, 3]),
    about(class_names=["dog"]),
    about(class_names="dogs"),
    about(grids={"audio": [True]}),
    about(seconds=0),
    about(seconds=float("inf")),
    about(encoders=["ears"]),
    about(seconds="8"),
    about(more=1),
    lambda tensors, config: config.update(data=[]),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_refused(folder: Path, tmp_path: Path, damage: Any) -> None:
    saved_again(folder, tmp_path, damage)
    with pytest.raises(DataError, match=r"another version .* or damaged .*train it again") as error:
        UniCode.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_model_is_saved_before_it_is_evaluated(
    clips_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cmg_pretrain, "fit_heads", before_call(1, interrupt, lambda *_: None))
    arguments = ["--data", str(clips_path), "--output", str(tmp_path), "--epochs", "1"]
    assert cmg_pretrain.main(arguments) == 130
    assert UniCode.from_pretrained(tmp_path).heads.clips == {}


def test_a_run_on_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        if name == "user/none":
            raise hub.errors.LocalEntryNotFoundError("not in\nthe cache")
        return str(folder / "run")

    monkeypatch.setattr(hub, "snapshot_download", download)
    model = UniCode.from_pretrained("user/clips", revision="v1", local_files_only=True)
    assert model.about.seconds == 8
    ((name, options),) = asked
    assert (name, options["revision"], options["local_files_only"]) == ("user/clips", "v1", True)
    assert options["allow_patterns"] == ["model.safetensors", "config.json"]
    with pytest.raises(DataError, match=r"user/none: neither a folder nor on the Hub \(not in the"):
        UniCode.from_pretrained("user/none")
    with pytest.raises(DataError, match="no such folder"):
        UniCode.from_pretrained(tmp_path / "none")
    out = tmp_path / "t.parquet"
    arguments = ["--data", str(folder / "store"), "--output", str(out), "--modalities", "text"]
    assert cmg_encode.main(["user/clips", *arguments]) == 0
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataError, match=r"huggingface_hub is not installed.*mmvq\[hub\]"):
        UniCode.from_pretrained("user/clips")


def encode(run: Path, data: Path, output: Path, *more: str) -> list[dict[str, Any]]:
    parquet = pytest.importorskip("pyarrow.parquet")
    arguments = [str(run), "--data", str(data), "--output", str(output), *more]
    assert cmg_encode.main(arguments) == 0
    rows: list[dict[str, Any]] = parquet.read_table(output).to_pylist()
    return rows


def test_a_table_of_tokens(
    folder: Path,
    stored: Clips,
    model: TrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In several row groups."""
    monkeypatch.setattr(token_table, "GROUP", 80)
    out = tmp_path / "tokens.parquet"
    rows = encode(folder / "run", folder / "store", out, "--labels-from", "text")
    parquet = pytest.importorskip("pyarrow.parquet")
    groups = parquet.ParquetFile(out).metadata.num_row_groups
    assert groups == -(-N // CLIPS_AT_ONCE)
    assert [(row["id"], row["modality"]) for row in rows] == [
        (f"clip {n}", name) for n in range(N) for name in NAMES
    ]
    tokens = model.tokens(stored.features, stored.masks)
    classes = model.classify_tokens(tokens, "text")
    for k, row in enumerate(rows):
        n, name = k // 3, row["modality"]
        assert row["tokens"] == tokens[name][n].tolist()
        assert row["mask"] == stored.valid(name)[n].tolist()
        if not any(row["mask"]):
            assert row["label"] is row["probability"] is None
        else:
            assert row["label"] == META["class_names"][classes[name].label[n]]
            assert row["probability"] == pytest.approx(float(classes[name].probability[n]))
    assert sum(row["label"] is None for row in rows) == -(-N // 9)


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_data_to_encode_need_no_labels_and_one_modality(
    folder: Path, model: TrainedModel, tmp_path: Path, kind: str
) -> None:
    """With another T, and arrays that are no modality of the run."""
    arrays = {"video": drawn("video", 35, 7).numpy(), "smell": np.zeros((35, 7, 2), np.float32)}
    data = write(tmp_path / "store", arrays)
    if kind == "npz":
        data = tmp_path / "x.npz"
        np.savez(data, **arrays, labels=np.array(["any"] * 3), split=np.zeros(2))  # not read
    rows = encode(folder / "run", data, tmp_path / "t.parquet")
    tokens = model.tokens({"video": torch.from_numpy(arrays["video"])})["video"]
    assert [row["tokens"] for row in rows] == tokens.tolist()
    assert [row["id"] for row in rows] == [str(n) for n in range(35)]
    assert [*rows[0]] == ["id", "modality", "tokens", "mask", "label", "probability"]
    assert {row["label"] for row in rows} == {None}
    assert {path.name for path in tmp_path.iterdir()} <= {"store", "x.npz", "t.parquet"}


def test_other_encoders_are_warned_of(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = {"audio": drawn("audio", 3, 4).numpy()}
    data = write(tmp_path / "store", arrays, {"encoders": {"audio": "nose"}})
    encode(folder / "run", data, tmp_path / "t.parquet")
    text = "warning: audio: the features are of nose, and the run was trained with ears."
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arrays", "more", "message"),
    [
        (
            {"audio": np.zeros((0, 4, 12), "f4")},
            [],
            "audio.npy: must be float [N, T, ..., C]",
        ),
        (
            {"smell": np.zeros((2, 4, 3), "f4")},
            [],
            "must have a modality of the model",
        ),
        ({"audio": np.zeros((2, 4, 3), "f4")}, [], "takes audio float [N, T, 12]; got float32[2,"),
        ({"audio": np.zeros((2, 4, 12), "f4")}, ["--modalities", "text"], "no modality 'text'"),
        (
            {"audio": np.zeros((2, 4, 12), "f4")},
            ["--modalities", "smell"],
            "--modalities: the model takes audio video text; got smell.",
        ),
        ({"audio": np.zeros((2, 4, 12), "f4")}, ["--labels-from", "smell"], "got 'smell'"),
        ({"audio": np.full((2, 4, 12), np.nan, "f4")}, [], "must be finite"),
        ({"audio": np.zeros((2, 4, 12), "f4")}, ["--device", "abacus"], "cannot use it here"),
        ({}, [], "has no media files. Hint: put videos in"),
    ],
)
def test_data_that_cannot_be_encoded_are_one_line(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arrays: Arrays,
    more: list[str],
    message: str,
) -> None:
    pytest.importorskip("pyarrow")
    data, out = write(tmp_path / "store", arrays), tmp_path / "t.parquet"
    out.write_bytes(b"earlier")
    arguments = [str(folder / "run"), "--data", str(data), "--output", str(out), *more]
    assert cmg_encode.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cmg_encode: ")
    assert message in line
    assert out.read_bytes() == b"earlier"
    assert {path.name for path in tmp_path.iterdir()} == {"store", "t.parquet"}


def test_without_pyarrow_the_extra_is_named(
    model: TrainedModel, stored: Clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'mmvq\[media\]'"):
        token_table.write_tokens(tmp_path / "t.parquet", model, stored)


@pytest.fixture(scope="session")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with "store", without labels and split, and "run", trained on it."""

    def make(at: Path) -> None:
        train(write(at / "store", features_of(make_arrays()), META), at / "run", 4)

    return once(tmp_path_factory, "unlabelled", make)


def test_a_run_without_labels(
    unlabelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the arrays are missing or all clips are of split 0."""
    zeros = {"split": np.zeros(N, np.int8), "labels": np.full(N, -1)}
    data = write(tmp_path / "store", features_of(make_arrays()) | zeros, META)
    train(data, tmp_path / "run", 4)
    printed = capsys.readouterr().out
    assert "no labels\n  splits: pre-train 108" in printed
    assert "validation 12" in printed
    assert "no labels, so there are no classifiers" in printed
    there, again = (
        json.loads((x / "run/metrics.json").read_text()) for x in (unlabelled, tmp_path)
    )
    assert there["classification"] == there["localization"] == {}
    assert len(there["agreement"]) == 6
    assert there["codebook"]["used"] > 1
    assert {**there, "seconds": 0} == {**again, "seconds": 0}
    one, two = (load_model(x / "run")[0] for x in (unlabelled, tmp_path))
    assert all(torch.equal(x, two[name]) for name, x in one.items())
    model = UniCode.from_pretrained(unlabelled / "run")
    assert model.tokens({"text": drawn("text", 2, 3)})["text"].shape == (2, 3)
    with pytest.raises(DataError, match=r"has no classifiers of clips; .*without their labels"):
        model.classify({"text": drawn("text", 2, 3)}, labels_from="text")


def test_the_clips_held_out_are_always_the_same() -> None:
    clips = Clips.of({"audio": torch.zeros(57, 2, 3)})
    held = clips.holding_out()
    assert len(held.test_rows()) == len(held.validation_rows()) == 5
    assert torch.equal(held.split, clips.holding_out().split)
    assert torch.equal(held.rows(0, 3), torch.arange(57))
    assert len(Clips.of({"audio": torch.zeros(3, 2, 3)}).holding_out().test_rows()) == 1


def test_labels_are_asked_for_where_they_are_needed(
    unlabelled: Path, clips_path: Path, tmp_path: Path, refused: Callable[..., str], capsys: Any
) -> None:
    store = unlabelled / "store"
    assert "takes clips with labels" in refused("--data", store, "--reference", "cca")
    data = ("--data", clips_path, "--output", tmp_path / "out", "--downstream", store)
    assert "array 'split' is missing" in refused(*data)
    capsys.readouterr()
    assert cmg_diagnose.main([str(unlabelled / "run"), "--data", str(store)]) == 2
    assert "array 'split' is missing" in capsys.readouterr().err
    with pytest.raises(DataError, match="array 'split' is missing"):
        load_clips(store)


def without(*names: str) -> Callable[[Arrays], object]:
    return lambda arrays: [arrays.pop(name) for name in names]


SEGMENTS = tuple(f"seg_labels_{name}" for name in NAMES)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("split"), "array 'split' is missing"),
        (without("split", "labels"), "array 'split' is missing"),  # of labels of segments
        (without("labels"), "array 'labels' is missing"),
        (without("labels", *SEGMENTS), "array 'labels' is missing"),
        (lambda a: a["split"].__setitem__(a["split"] == 1, 0), "must have clips of split 1"),
        (lambda a: a["split"].__setitem__(a["split"] == 2, 1), "must have clips of split 2"),
        (lambda a: a["split"].__setitem__(a["split"] == 0, 1), "must have clips of split 0"),
        (lambda a: a.update(split=np.zeros(N)), "split: must be int [N]"),
        (lambda a: a.update(split=np.ones(N, int)), "must have clips of split 0"),
    ],
)
def test_data_with_some_labels_need_all(
    arrays: Arrays, tmp_path: Path, spoil: Callable[[Arrays], object], message: str
) -> None:
    spoil(arrays)
    np.savez(tmp_path / "x.npz", **arrays)
    for labels in ("required", "optional"):
        with pytest.raises(DataError) as error:
            load_clips(tmp_path / "x.npz", labels=labels)
        assert message in str(error.value)
    clips = load_clips(tmp_path / "x.npz", ["text"], labels="ignored")
    assert (clips.labelled, clips.modalities, len(clips.labels)) == (False, ("text",), N)


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan"), "ten", [1]])
def test_seconds_that_are_none(tmp_path: Path, seconds: Any) -> None:
    folder = write(tmp_path, features_of(make_arrays()), {"seconds": seconds})
    with pytest.raises(DataError, match=r"must be a JSON object of version, .* and seconds"):
        load_clips(folder, labels="ignored")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[0, 4096]]), "must be -1 to .* got up to 4096"),
        (torch.tensor([[-2, 0]]), "must be -1 to"),
        (torch.zeros(2, 3), r"must be int \[N, T\]; got torch.float32"),
        (torch.zeros(3, dtype=torch.long), r"must be int \[N, T\]"),
    ],
)
def test_tokens_of_another_model_are_refused(
    model: TrainedModel, tokens: torch.Tensor, message: str
) -> None:
    for use in (model.vectors, lambda x: model.classify_tokens(x, "audio")):
        with pytest.raises(DataError, match=f"tokens of video: {message}"):
            use({"video": tokens})


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, of its exporter
def test_onnx_from_raw_features_to_tokens(model: TrainedModel, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with pytest.raises(DataError, match="got 'smell'"):
        model.export_onnx(tmp_path / "x.onnx", "smell")
    path = tmp_path / "video.onnx"
    model.export_onnx(path, "video")
    session = runtime.InferenceSession(path)
    for n, segments in ((5, 4), (1, 1), (3, 17)):
        x, mask = drawn("video", n, segments), torch.ones(n, segments, dtype=torch.bool)
        mask[0, 1:], mask[1:2] = False, False  # padding, and a clip without video
        x[~mask] = torch.nan
        given = {"features": x.numpy(), "mask": mask.numpy()}
        (found,) = session.run(["tokens"], given)
        expected = model.tokens({"video": x}, {"video": mask})["video"]
        assert found.dtype == np.int64
        z = model.semantic_features({"video": x}, {"video": mask})["video"]
        near = (z[..., None, :] - model.codebook).square().sum(-1).topk(2, largest=False).values
        clear = near[..., 1] - near[..., 0] > 1e-3
        assert torch.equal(torch.from_numpy(found)[clear], expected[clear])
        assert clear.float().mean() > 0.9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_run_on_a_gpu(folder: Path, model: TrainedModel) -> None:
    x = {name: drawn(name, 130, 5) for name in NAMES}
    there = UniCode.from_pretrained(folder / "run").to("cuda")
    for features in (x, {name: v.cuda() for name, v in x.items()}):
        for name, found in there.tokens(features).items():
            assert (found == model.tokens(x)[name]).float().mean() > 0.99
    assert there.classify(x, labels_from="audio")["text"].label.shape == (130,)


def test_the_words_of_a_store_are_kept(stored: Clips, tmp_path: Path) -> None:
    from cmg.store import write_store

    write_store(tmp_path / "again", replace(stored, seconds=2.5))
    again = load_clips(tmp_path / "again")
    assert (again.seconds, again.class_names) == (2.5, stored.class_names)
