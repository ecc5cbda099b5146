"""Malformed files: only DataError comes out, on one line, and nothing that they hold is run.

Hypothesis mutates good files: their bytes; the arrays inside an npz, whose checksums are then made
right again, so that the damage reaches numpy; the header of a safetensors file and the JSON in it.
MMVQ_FUZZ is how many inputs each test tries (40 if not set).
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import peak_growth

from cmg import digits
from cmg.checkpoint import load_checkpoint, load_model, save_checkpoint, save_model
from cmg.clips import Clips
from cmg.data import load_clips
from cmg.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore")  # numpy's about odd headers, for instance
INPUTS = int(os.environ.get("MMVQ_FUZZ", "40"))
fuzzed = settings(
    max_examples=INPUTS,
    deadline=None,
    derandomize=INPUTS == 40,
    database=None,
    suppress_health_check=list(HealthCheck),
)
KINDS = [
    *("'<f4'", "'<f8'", "'>f2'", "'<c16'", "'<i8'", "'|b1'", "'|O'", "'|V0'", "'<M8[s]'"),
    *("'<U9999999'", "'|S1000000000000'", "[('a', '<f4')]", "3", "None", "'é'", "'<f4', 'x': 1"),
]
HUGE = [-(2**63), -1, 0, 1, 2**31, 10**9, 10**12, 2**63 - 1, 2**64, 10**30]


def attempt(load: Callable[[], Any]) -> Any:
    """What was loaded, or the one line of the DataError; any other exception comes through."""
    try:
        return load()
    except DataError as error:
        return one_line(str(error))


def one_line(text: str) -> str:
    assert text
    assert "\n" not in text
    return text


@st.composite
def byte_mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Up to six cuts, overwrites, insertions and copies, at places given as shares of the whole."""
    share = st.floats(0, 1, exclude_max=True)
    edits = draw(
        st.lists(
            st.tuples(st.sampled_from("oidct"), share, share, st.binary(max_size=8)),
            min_size=1,
            max_size=6,
        )
    )

    def mutate(content: bytes) -> bytes:
        for kind, where, what, new in edits:
            i, j = int(where * len(content)), int(what * len(content))
            match kind:
                case "o":
                    content = content[:i] + new + content[i + len(new) :]
                case "i":
                    content = content[:i] + new + content[i:]
                case "d":
                    content = content[:i] + content[i + len(new) + 1 :]
                case "c":
                    content = content[:i] + content[min(i, j) : max(i, j)] + content[i:]
                case "t":
                    content = content[:i] if len(new) > 4 else content
        return content

    return mutate


def npy(header: str, body: bytes, version: int = 1) -> bytes:
    """An npy file with this header, whatever it says."""
    text = header.encode("latin1", "replace") + b"\n"
    size = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + body


def npys() -> st.SearchStrategy[bytes]:
    """Arrays with drawn types, orders and shapes, far larger than their content at times."""
    shape = st.one_of(
        st.lists(st.sampled_from([*HUGE, 2, 4, 120]), max_size=6).map(tuple).map(repr),
        st.sampled_from(["()", "5", "(1.5,)", "('a',)", "(" * 200, "[2]", "(True, 4)", "None"]),
    )
    kind = st.sampled_from(KINDS)
    header = st.builds(
        "{{'descr': {}, 'fortran_order': {}, 'shape': {}, }}".format,
        kind,
        st.sampled_from(["True", "False", "2"]),
        shape,
    )
    return st.builds(
        npy,
        st.one_of(header, st.text(max_size=40)),
        st.sampled_from([b"", b"\0" * 64, pickle.dumps([1]), bytes(4 * 120 * 4)]),
        st.sampled_from([1, 2, 3, 9]),
    )


@pytest.fixture(scope="module")
def good(clips_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that load."""
    folder = tmp_path_factory.mktemp("good")
    with np.load(clips_path) as file:
        np.savez_compressed(folder / "deflated.npz", **file)
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.zeros(2).bfloat16()}
    save_checkpoint(folder / "checkpoint", {"model": tensors, "epoch": 3, "list": [1, (2.5, None)]})
    save_model(folder, tensors, {"dim": 3, "modalities": ["audio"]})
    (folder / "model.safetensors").rename(folder / "model")
    (folder / "deflated.npz").rename(folder / "deflated")
    (folder / "stored").write_bytes(clips_path.read_bytes())
    return folder


LOADERS: dict[str, Callable[[Path], object]] = {
    "stored": load_clips,
    "deflated": load_clips,
    "checkpoint": load_checkpoint,
    "model": lambda path: load_model(path.parent),
}


@pytest.mark.parametrize("kind", LOADERS)
@fuzzed
@given(mutate=byte_mutations())
def test_bytes(kind: str, good: Path, tmp_path: Path, mutate: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(mutate((good / kind).read_bytes()))
    attempt(lambda: LOADERS[kind](path))


@fuzzed
@given(
    changes=st.dictionaries(
        st.sampled_from(["audio", "video", "labels", "split", "seg_labels_audio", "video_box"]),
        st.one_of(npys(), byte_mutations()),
        min_size=1,
    ),
    names=st.dictionaries(
        st.sampled_from(["a.b", "type", "x", "seg_labels_x", "é"]), npys(), max_size=2
    ),
    method=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]),
)
def test_arrays(
    good: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    names: dict[str, bytes],
    method: int,
) -> None:
    """Checksums are right; what the arrays say is not. What loads all the same is usable."""
    path = tmp_path / "clips.npz"
    with zipfile.ZipFile(good / "stored") as old, zipfile.ZipFile(path, "w", method) as new:
        for member in old.namelist():
            content = old.read(member)
            change = changes.get(member.removesuffix(".npy"), content)
            new.writestr(member, change(content) if callable(change) else change)
        for name, content in names.items():
            new.writestr(f"{name}.npy", content)
    clips = attempt(lambda: load_clips(path))
    if isinstance(clips, Clips):
        assert all(x.isfinite().all() for x in clips.features.values())
        assert len({len(x) for x in (clips.labels, clips.split, *clips.features.values())}) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.sampled_from(HUGE) | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
NODES = st.recursive(
    st.sampled_from([["tensor", "a"], ["tensor", 7], ["value", 1], ["odd", 2], [], None, "dict"]),
    lambda inner: st.tuples(
        st.sampled_from(["dict", "list", "tuple", "tensor", "value"]),
        st.lists(inner | st.tuples(st.sampled_from(["k", 1, []]), inner), max_size=3) | inner,
    ).map(list),
    max_leaves=6,
)


def with_header(content: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A safetensors file whose header was changed, its length made right again."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


@pytest.mark.parametrize("kind", ["checkpoint", "model"])
@fuzzed
@given(
    tensor=st.sampled_from(["dtype", "shape", "data_offsets", "new", "metadata"]),
    value=st.one_of(
        JSON,
        st.sampled_from(["F4", "F8_E8M0", "F64", "BOOL", "U64", "C64"]),
        st.lists(st.sampled_from([*HUGE, 3, 4]), max_size=3),
    ),
    text=st.one_of(
        JSON.map(json.dumps), NODES.map(json.dumps), st.text(max_size=20), st.just("[" * 10**5)
    ),
)
def test_headers(kind: str, good: Path, tmp_path: Path, tensor: str, value: Any, text: str) -> None:
    """Of tensors that claim other types, shapes and places, and of JSON that is no state."""

    def change(header: dict[str, Any]) -> None:
        first = next(name for name in header if name != "__metadata__")
        if tensor == "metadata":
            header["__metadata__"] = dict.fromkeys(header["__metadata__"], text)
        elif tensor == "new":
            header["new"] = value
        else:
            header[first][tensor] = value

    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header((good / kind).read_bytes(), change))
    attempt(lambda: LOADERS[kind](path))


@fuzzed
@given(mutate=byte_mutations())
def test_the_cache_of_digits_is_rendered_again_or_whole(
    good: Path, tmp_path: Path, mutate: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"digits-v{digits.VERSION}-seed0.npz"
    path.write_bytes(mutate((good / "deflated").read_bytes()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "render", lambda seed: {"fresh": np.arange(3)})
        digits.load(0, tmp_path)
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_no_pickle_is_ever_run(clips_path: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    pickled = pickle.dumps(Payload(ran))
    pickle.loads(pickled)
    assert ran.exists()  # the payload works
    ran.unlink()
    path = tmp_path / "model.safetensors"
    with np.load(clips_path) as file:
        arrays = dict(file)
    payload = np.array([Payload(ran)])
    for name in arrays:
        np.savez(tmp_path / "x.npz", **{**arrays, name: payload})
        attempt(lambda: load_clips(tmp_path / "x.npz", ["audio", "video", "text"]))
    array = npy("{'descr': '|O', 'fortran_order': False, 'shape': (), }", pickled)
    for content in (pickled, array):
        path.write_bytes(content)
        for load in LOADERS.values():
            with pytest.raises(DataError):
                load(path)
    torch.save({"x": Payload(ran)}, path)
    for load in LOADERS.values():
        with pytest.raises(DataError):
            load(path)
    assert not ran.exists()


def test_an_array_that_claims_to_be_huge_takes_no_memory(
    arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    call = ""
    for i, shape in enumerate([(10**12,), (10**5, 10, 128), (2**31, 2**31, 4)]):
        path = tmp_path / f"{i}.npz"
        np.savez(path, **arrays)
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
        with zipfile.ZipFile(path, "a") as file:
            file.writestr("claim.npy", npy(header, bytes(100)))
        call += (
            f"try: load_clips({str(path)!r}, ['claim'])\nexcept DataError as e: said.append(e)\n"
        )
    setup = (
        "import sys; sys.path.insert(0, 'examples'); said = []\n"
        "from cmg.data import load_clips; from cmg.errors import DataError"
    )
    assert peak_growth(setup, f"{call}assert len(said) == 3") < 100  # MiB; the second claims 488
