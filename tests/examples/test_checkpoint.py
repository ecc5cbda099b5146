"""Checkpoints: exact, whole, and nobody else's."""

from __future__ import annotations

import json
import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import run_python
from torch import nn

from cmg import files
from cmg.checkpoint import (
    load_checkpoint,
    load_model,
    random_state,
    save_checkpoint,
    save_model,
    set_random_state,
)
from cmg.errors import DataError
from cmg.files import write_atomic


def same(a: Any, b: Any) -> bool:
    """Equal in type, structure and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        bits = a.dtype == b.dtype and a.shape == b.shape
        return bits and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(x, b[key]) for key, x in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_everything_comes_back_to_the_bit(tmp_path: Path) -> None:
    tied = torch.randn(3)
    state = {
        "dtypes": [
            torch.tensor([1.0, torch.nan, -0.0]).to(dtype)
            for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        ],
        "integers": torch.arange(5),
        "tied": {"a": tied, "b": tied},
        "strided": torch.arange(6.0).reshape(2, 3).T.contiguous(),
        "nothing": torch.empty(0, 4),
        "numbers": (1, 0.1, 1e-320, 2**70, True, None, "ö/[]"),
        "nested": {0: {"1": [(), {}, []]}, "0": "not the same key"},
    }
    save_checkpoint(tmp_path / "state.safetensors", state)
    assert same(load_checkpoint(tmp_path / "state.safetensors"), state)


def test_views_are_kept_as_they_look(tmp_path: Path) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    save_checkpoint(tmp_path / "s", {"turned": x.T, "row": x[1]})
    state = load_checkpoint(tmp_path / "s")
    assert torch.equal(state["turned"], x.T)
    assert torch.equal(state["row"], x[1])


def run(steps: int, folder: Path | None = None, stop: int = -1) -> list[torch.Tensor]:
    """Train a dropout net with AdamW and a schedule; at `stop`, leave and return through a file."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    torch.manual_seed(0)
    model, optimizer, schedule = build()
    for step in range(steps):
        if step == stop and folder is not None:
            parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
            state = {name: part.state_dict() for name, part in parts.items()}
            save_checkpoint(folder / "state", state | {"random": random_state()})
            torch.manual_seed(99)
            model, optimizer, schedule = build()
            state = load_checkpoint(folder / "state")
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            set_random_state(state["random"])
        optimizer.zero_grad()
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
        schedule.step()
    return [x.detach() for x in model.parameters()]


def test_resuming_equals_never_stopping(tmp_path: Path) -> None:
    straight = run(12)
    resumed = run(12, tmp_path, stop=5)
    assert same(resumed, straight)
    assert not same(run(11), straight)


def test_an_interrupted_write_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    save_checkpoint(path, {"step": 1})

    def pull_the_plug(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", pull_the_plug)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_too_large_for_the_disk_loses_nothing(tmp_path: Path) -> None:
    """A limit of the operating system, reached in the middle of the write."""
    path = tmp_path / "state"
    save_checkpoint(path, {"x": torch.zeros(10)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(DataError, match=r"state: cannot be written; .*too large"):
            save_checkpoint(path, {"x": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.equal(load_checkpoint(path)["x"], torch.zeros(10))
    assert list(tmp_path.iterdir()) == [path]


WRITE = "import os, sys; from cmg import files; {}files.write_atomic(sys.argv[1], b'short')"


def test_what_a_killed_write_left_is_taken_over(tmp_path: Path) -> None:
    killed = WRITE.format("files.os.replace = lambda *_: os.kill(os.getpid(), 9); ")
    with pytest.raises(AssertionError, match="ended with -9"):
        run_python("-c", killed, str(tmp_path / "state"))
    (left,) = (path.name for path in tmp_path.iterdir())
    assert left.startswith(".state.")
    save_checkpoint(tmp_path / "other", {"step": 1})
    assert {path.name for path in tmp_path.iterdir()} == {left, "other"}
    save_checkpoint(tmp_path / "state", {"step": 1})
    assert {path.name for path in tmp_path.iterdir()} == {"state", "other"}


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_two_writes_at_once_are_both_whole(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process writes the same path while the first is at it; the last to rename wins."""
    path, call = tmp_path / "state", getattr(os, moment)

    def another(*arguments: Any) -> None:
        monkeypatch.setattr(files.os, moment, call)
        run_python("-c", WRITE.format(""), str(path))
        assert path.read_bytes() == b"short"
        call(*arguments)

    monkeypatch.setattr(files.os, moment, another)
    write_atomic(path, b"long" * 1000)
    assert path.read_bytes() == b"long" * 1000
    assert list(tmp_path.iterdir()) == [path]


MANY = """
import os, pathlib, sys
from cmg.files import write_atomic

path = pathlib.Path(sys.argv[1])
children = []
for digit in "1234":
    child = os.fork()
    if child == 0:
        for _ in range(100):
            write_atomic(path, digit.encode() * 5000)
        sys.exit()
    children.append(child)
seen = set()
while children:
    content = path.read_text()
    assert content == content[0] * 5000
    seen.add(content[0])
    done, status = os.waitpid(-1, os.WNOHANG)
    if done:
        assert status == 0
        children.remove(done)
print(*sorted(seen))
"""


def test_many_processes_write_one_path(tmp_path: Path) -> None:
    """Each write succeeds, and a reader finds one of them whole."""
    path = tmp_path / "state"
    path.write_text("0" * 5000)
    assert len(run_python("-c", MANY, str(path)).split()) > 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_replaced_and_what_it_points_at_is_not_written(tmp_path: Path) -> None:
    """Neither under the name itself nor under one that a write could have left."""
    target, path = tmp_path / "target", tmp_path / "state"
    target.write_bytes(b"precious")
    path.symlink_to(target)
    for name in (".state.partial", ".state.0123456789abcdef.partial"):
        (tmp_path / name).symlink_to(target)
    write_atomic(path, b"new")
    with files.in_use(tmp_path):
        pass
    assert target.read_bytes() == b"precious"
    assert (tmp_path / ".state.0123456789abcdef.partial").is_symlink()  # not ours
    assert not path.is_symlink()
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_torn_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "state"
    save_checkpoint(path, {"x": torch.randn(100)})
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match="state: damaged, or not a safetensors file"):
        load_checkpoint(path)


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    """Of the names, types and text in the header, and of the numbers."""
    state = {"x": torch.randn(9), "same": torch.randn(9), "epoch": 3, "flag": True, "half": (1.5,)}
    path = tmp_path / "model.safetensors"
    for load, save in (
        (lambda: load_checkpoint(path), lambda: save_checkpoint(path, state)),
        (lambda: load_model(tmp_path), lambda: save_model(tmp_path, {"x": state["x"]}, {"d": 3})),
    ):
        save()
        whole, found = path.read_bytes(), load()
        for place in range(len(whole)):
            content = bytearray(whole)
            content[place] ^= 1 << place % 8
            path.write_bytes(content)
            with suppress(DataError):
                assert same(load(), found)  # such as a space of the header, for a tab
        content = bytearray(whole)
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(
            DataError, match=r"safetensors: damaged: its checksum is \w{8}, and was"
        ):
            load()


def test_files_without_a_checksum_load(tmp_path: Path) -> None:
    """Those of earlier versions."""
    tensors = {"x": torch.randn(3)}
    save_file(tensors, tmp_path / "model.safetensors", {"config": '{"dim": 3}'})
    there, config = load_model(tmp_path)
    assert same(there, tensors)
    assert config == {"dim": 3}
    tree = '["dict", [["x", ["tensor", "x"]]]]'
    save_file(tensors, tmp_path / "old", {"mmvq_cmg_state": tree})
    assert same(load_checkpoint(tmp_path / "old"), tensors)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="not a checkpoint of this example"):
        load_checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="not a model of this example"):
        load_model(tmp_path)
    torch.save({"x": torch.zeros(2)}, tmp_path / "state.pt")
    with pytest.raises(DataError, match="damaged, or not a safetensors file"):
        load_checkpoint(tmp_path / "state.pt")
    with pytest.raises(DataError, match="none: no such file"):
        load_checkpoint(tmp_path / "none")


def test_what_cannot_be_kept_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot save state/a/0, a set"):
        save_checkpoint(tmp_path / "state", {"a": [{1}]})
    with pytest.raises(TypeError, match=r"keys are str or int; state/a has 1\.5"):
        save_checkpoint(tmp_path / "state", {"a": {1.5: 0}})
    assert not (tmp_path / "state").exists()


def test_a_model_and_its_config(tmp_path: Path) -> None:
    tensors = {"weight": torch.randn(2, 3)}
    config = {"dim": 3, "modalities": ["audio", "video"]}
    save_model(tmp_path / "new" / "folder", tensors, config)
    there, its = load_model(tmp_path / "new" / "folder")
    assert same(there, tensors)
    assert its == config
    assert json.loads((tmp_path / "new" / "folder" / "config.json").read_text()) == config
