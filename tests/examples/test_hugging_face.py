"""Hugging Face data sets: the clips and batches of an npz file of the same arrays."""

from __future__ import annotations

import json
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cmg_pretrain
import numpy as np
import pytest
import torch
from examples.conftest import Arrays, N, T, make_arrays
from support import ROOT, once, same

from cmg.batches import Batches, Loader, Order
from cmg.clips import Clips
from cmg.data import load_clips
from cmg.errors import DataError
from cmg.hugging_face import load_datasets
from cmg.sources import open_data, open_to_encode
from cmg.standardize import Standardizer

datasets = pytest.importorskip("datasets")
NAMES = ("a cat", "a dog", "rain")


def complete() -> Arrays:
    """Every kind of column; some clips lack video, and others end early."""
    arrays = make_arrays()
    arrays["labels"] = np.maximum(arrays["labels"], -1)  # a ClassLabel may not be less
    arrays["mask_video"] = np.arange(T) < np.random.default_rng(0).integers(0, T + 1, N)[:, None]
    return arrays | {"ids": np.array([f"clip {n}" for n in range(N)]), "rate": np.ones(N)}


def dataset_of(arrays: Arrays) -> Any:
    """Fixed shapes for video, lists for the others, in chunks of seven rows."""
    video = datasets.Array4D(arrays["video"].shape[1:], "float16")
    known = {"video": video, "labels": datasets.ClassLabel(names=list(NAMES))}
    known = {name: feature for name, feature in known.items() if name in arrays}
    columns = {name: [*x] if name in known else x.tolist() for name, x in arrays.items()}
    found = datasets.Dataset.from_dict(columns)
    features = datasets.Features({**found.features, **known})
    features["audio"] = datasets.List(datasets.List(datasets.Value("float32")))
    return found.cast(features, batch_size=7)


def make(folder: Path) -> None:
    arrays = complete()
    np.savez(folder / "clips.npz", **arrays)
    whole = dataset_of(arrays)
    whole.save_to_disk(folder / "one", num_shards=3)
    parts = {"a": whole.select(range(50)), "b": whole.select(range(50, N))}
    datasets.DatasetDict(parts).save_to_disk(folder / "two")
    (folder / "parquet").mkdir()
    for name, part in parts.items():
        part.to_parquet(folder / "parquet" / f"{name}.parquet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "hugging-face", make)


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("kind", ["one", "two", "parquet"])
def test_the_clips_are_those_of_an_npz_file(folder: Path, kind: str) -> None:
    found, expected = load_datasets(str(folder / kind)), load_clips(folder / "clips.npz")
    assert found.modalities == expected.modalities
    every = torch.arange(N)
    for name in expected.modalities:
        x = found.features[name]
        assert not isinstance(x, torch.Tensor)
        assert tuple(x.shape) == tuple(expected.features[name].shape)
        assert torch.equal(found.read(name, every), expected.read(name, every))
        assert found.read(name, every).dtype == expected.features[name].dtype  # type: ignore[attr-defined]
    for part in ("masks", "segment_labels"):
        assert same(getattr(found, part), getattr(expected, part))
    assert torch.equal(found.split, expected.split)
    assert torch.equal(found.labels, expected.labels)
    assert found.video_box is not None
    assert found.video_box.equal(expected.video_box)
    assert (found.ids, found.num_classes) == (expected.ids, expected.num_classes)
    assert (found.class_names, found.unused) == (NAMES, {"rate": f"float64[{N}]"})


@pytest.mark.parametrize("workers", [0, 2])
def test_the_batches_are_those_of_an_npz_file(folder: Path, workers: int) -> None:
    opened = [load_datasets(str(folder / "one")), load_clips(folder / "clips.npz")]
    device, seen = torch.device("cpu"), []
    for clips in opened:
        torch.manual_seed(0)
        batches = Batches(clips, Standardizer.fit(clips), in_memory=1e-9)
        order = Order(clips.rows(0), 8)
        order.shuffle()
        read = Loader(batches, order, workers, device)
        seen.append([batches.ready(batch, device) for batch in read])
    for (x, masks), (y, others) in zip(*seen, strict=True):
        assert same(x, y)
        assert same(masks, others)


def test_rows_travel_to_another_process(folder: Path) -> None:
    x = load_datasets(str(folder / "one")).features["video"]
    rows = torch.tensor([70, 3, 70])
    assert torch.equal(pickle.loads(pickle.dumps(x))[rows], x[rows])
    assert x[rows[:0]].shape == (0, T, 2, 2, 6)


def test_a_run(folder: Path, tmp_path: Path) -> None:
    """The same scores as from the npz file; what was measured is stored, and used again."""
    options = ["--epochs", "1", "--in-memory", "1e-9", "--workers", "0", "--output"]
    results = []
    for data in (folder / "clips.npz", f"datasets:{folder / 'one'}"):
        assert cmg_pretrain.main(["--data", str(data), *options, str(tmp_path)]) == 0
        results.append(json.loads((tmp_path / "metrics.json").read_text()))
    for metrics in results:
        del metrics["dataset"], metrics["seconds"]
    assert results[0] == results[1]
    stored = folder / "one/standardizer/video/model.safetensors"
    before = stored.stat().st_mtime_ns
    Standardizer.of(load_datasets(str(folder / "one")))
    assert stored.stat().st_mtime_ns == before


def test_the_guide_writes_the_same_clips_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/guides/large-data.md").read_text()
    names: dict[str, object] = {}
    for code in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(code, names)
    (_, folder), (_, arrow) = open_data("clips"), open_data("datasets:clips-arrow")
    assert folder.modalities == arrow.modalities
    every = torch.arange(len(folder.split))
    for name in folder.modalities:
        assert torch.equal(folder.read(name, every), arrow.read(name, every))
    assert same(folder.masks, arrow.masks)
    assert torch.equal(folder.labels, arrow.labels)
    assert len(list(Path("clips-arrow").glob("*.arrow"))) == 4


def save(arrays: Arrays, path: Path) -> str:
    dataset_of(arrays).save_to_disk(path)
    return str(path)


def ragged(arrays: Arrays, path: Path) -> str:
    found = dataset_of(arrays)
    rows = arrays["text"].tolist()
    rows[7] = [rows[7][0][:3], *rows[7][1:]]
    found = found.remove_columns("text").add_column("text", rows)
    found.save_to_disk(path)
    return str(path)


def missing_value(arrays: Arrays, path: Path) -> str:
    found = dataset_of(arrays).remove_columns("split")
    found.add_column("split", [None, *arrays["split"][1:].tolist()]).save_to_disk(path)
    return str(path)


def without_rows(arrays: Arrays, path: Path) -> str:
    path.mkdir()
    dataset_of(arrays).select([]).to_parquet(path / "a.parquet")
    return str(path)


def structs(arrays: Arrays, path: Path) -> str:
    found = dataset_of(arrays).remove_columns("labels")
    found.add_column("labels", [{"a": 1}] * N).save_to_disk(path)
    return str(path)


def damaged(arrays: Arrays, path: Path) -> str:
    save(arrays, path)
    (path / "state.json").write_text("{")
    return str(path)


def without(name: str) -> Callable[[Arrays, Path], str]:
    return lambda arrays, path: save({k: x for k, x in arrays.items() if k != name}, path)


BAD: dict[str, tuple[Callable[[Arrays, Path], str], str]] = {
    "no folder": (lambda arrays, path: str(path), "datasets:.*: no such folder"),
    "damaged": (damaged, "datasets:.*: cannot be opened"),
    "no rows": (without_rows, "datasets:.*: cannot be opened"),
    "no labels": (without("labels"), "array 'labels' is missing"),
    "a value is missing": (missing_value, r"split: cannot be read \(a value is missing\)"),
    "structs": (structs, r"labels: cannot be read \(it holds struct<.*>, not numbers\)"),
    "T": (
        lambda arrays, path: save(arrays | {"audio": arrays["audio"][:, 1:]}, path),
        f"text: must have T = {T - 1} segments|video: must have T = {T - 1} segments",
    ),
    "one class more": (
        lambda arrays, path: save(arrays | {"seg_labels_audio": arrays["mask_video"] * 7}, path),
        "class_names has 3 names; the labels go up to 7",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case: str, tmp_path: Path) -> None:
    spoil, message = BAD[case]
    source = spoil(complete(), tmp_path / "bad")
    with pytest.raises(DataError, match=message) as error:
        open_data(f"datasets:{source}")
    assert "\n" not in str(error.value)
    assert source in str(error.value)


def test_clips_of_several_lengths(tmp_path: Path) -> None:
    """In the first row at once; in others when they are read."""
    clips = load_datasets(ragged(complete(), tmp_path / "bad"))
    assert clips.read("text", torch.tensor([0, 6])).shape == (2, T, 9)
    with pytest.raises(DataError, match=r"text: cannot be read \(clips differ .*Hint: pad clips"):
        clips.read("text", torch.tensor([0, 7]))


def test_a_name_that_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **_: object) -> Clips:
        raise ConnectionError(f"{name}\nis unknown")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"^datasets:a/b: neither .* the Hub \(a/b is unknown\)"):
        load_datasets("a/b")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"datasets is not installed\. Hint: pip install datasets"):
        load_datasets("a/b")


def test_columns_without_labels(tmp_path: Path) -> None:
    """Train on them, and encode one of them."""
    arrays = complete()
    bare = {name: arrays[name] for name in ("audio", "video", "mask_video")}
    dataset_of(bare).save_to_disk(tmp_path / "bare")
    source = f"datasets:{tmp_path / 'bare'}"
    _, clips = open_data(source, labels="optional")
    assert (clips.labelled, clips.modalities, len(clips.rows(0))) == (False, ("audio", "video"), N)
    one = open_to_encode(source, ["video", "text"])
    assert one.modalities == ("video",)
    assert torch.equal(one.masks["video"], torch.from_numpy(arrays["mask_video"]))
    with pytest.raises(DataError, match="array 'split' is missing"):
        open_data(source)
