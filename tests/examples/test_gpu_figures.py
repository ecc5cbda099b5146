"""What `make gpu` does around the GPU, tried without one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, peers, search

WITHOUT = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="test_one"/>
<testcase classname="tests.a" name="test_two"><failure message="no">long</failure></testcase>
<testcase classname="tests.b" name="test_three"><skipped message="two GPUs"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call is made, and takes 2 microseconds, or 8 with the host."""
    monkeypatch.setattr(gpu, "by_graph", lambda call: (call(), 2.0)[1])
    monkeypatch.setattr(gpu, "eager", lambda call: (call(), 8.0)[1])


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    assert {"device", "driver", "torch", "triton", "mmvq", "left out"} <= found.keys()
    return found


@WITHOUT
def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.benchmarks.gpu", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "gpu: torch sees no GPU; nothing was run\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "stages"),
    [
        ([], [s for s in gpu.SECONDS if s != "tiles"]),
        (["sanitizer", "tests"], ["tests", "sanitizer"]),
        (["figures", "tests"], ["tests", *gpu.FIGURES]),
    ],
)
def test_stages_are_picked(
    arguments: list[str], stages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []

    def run(*given: Any) -> list[str]:
        found.append(given)
        return ["tests"]

    monkeypatch.setattr(gpu, "run_stages", run)
    with pytest.raises(SystemExit, match="1"):
        gpu.main(["--quick", "--output", str(tmp_path), *arguments])
    assert found == [(stages, tmp_path.resolve(), gpu.BUDGET, True)]


def test_what_cannot_be_is_said_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--quick", "speed"])
    assert capsys.readouterr().err.endswith("there is no stage speed\n")
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--quick", "--output", __file__])
    assert capsys.readouterr().err.endswith(f"--output {__file__}: must be a folder\n")


def test_each_stage_has_its_time_and_what_others_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    until: dict[str, float] = {}

    def run(command: list[str], ends: float, **_: Any) -> tuple[int, str]:
        until[command[4]] = ends
        return int(command[4] == "update"), ""

    monkeypatch.setattr(gpu, "run_apart", run)
    monkeypatch.setattr(gpu, "run_tests", lambda output, ends, workers: False)
    start = time.time()
    stages = ["tests", "step", "update"]
    assert gpu.run_stages(stages, tmp_path, 90, quick=True) == ["tests", "update"]
    each = 90 / sum(gpu.SECONDS[stage] for stage in stages)
    shares = gpu.SECONDS["tests"] + gpu.SECONDS["step"]
    assert until["step"] - start == pytest.approx(20 + each * shares, abs=1)
    assert until["update"] - start == pytest.approx(20 + 90, abs=1)


def test_a_row_is_written_at_once_and_an_error_in_its_place(tmp_path: Path) -> None:
    file = gpu.File(tmp_path / "rows.json")
    file.row(lambda: {"us": 1 / 3, "n": 5}, way="one", L=7)
    assert read(file.path)["rows"] == [{"way": "one", "L": 7, "us": 0.3333, "n": 5}]
    file.row(lambda: {"us": 1 / 0}, way="two")
    assert read(file.path)["rows"][1]["error"].startswith("ZeroDivisionError")
    assert file.found("us", way="one") == [0.3333]
    assert file.found("us", way="two") == []
    file.until = 0.0
    file.row(lambda: {"us": 1.0}, way="three", L=9)
    assert read(file.path)["left out"] == ["three, 9"]
    assert len(read(file.path)["rows"]) == 2


def test_an_error_of_ours_fails_the_stage_and_one_of_a_peer_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(file: gpu.File, device: str, quick: bool) -> None:
        file.row(lambda: {"us": 1 / 0}, peer=True, way="theirs")
        if ours:
            file.row(lambda: {"us": 1 / 0}, way="mmvq", L=7)

    monkeypatch.setitem(gpu.FUNCTIONS, "step", rows)
    ours = False
    gpu.run_figure("step", tmp_path, time.time() + 300, quick=True)
    ours = True
    with pytest.raises(SystemExit, match=r"^failed: mmvq, 7$"):
        gpu.run_figure("step", tmp_path, time.time() + 300, quick=True)
    assert len(read(tmp_path / "step.json")["rows"]) == 2


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("name", gpu.FIGURES)
def test_every_figure_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "launches":
        pytest.importorskip("triton")
    monkeypatch.setattr(peers, "find", lambda module: None)
    gpu.run_figure(name, tmp_path, time.time() + 300, quick=True)
    found = read(tmp_path / f"{name}.json")
    if name == "launches":
        assert found["step"]["forward"] > 0
        assert found["vector_quantize_pytorch"] is None
        return
    assert [row for row in found["rows"] if "error" in row] == []
    assert found["rows"][0]["us"] in (2.0, 8.0)
    if name == "step":
        assert found["left out"] == ["vector_quantize_pytorch: not installed"]
        assert found["aims"]["us of a step as a CUDA graph"]["reached"]
    if name == "search":
        ours = [row for row in found["rows"] if row["way"] == "mmvq, exact"]
        assert [row["farther"] for row in ours] == [0.0] * 4
        assert found["mmvq, exact, over"]["cdist, float32"]["mean"] == 1.0
    if name == "update":
        assert not found["aims"]["update over the time its bytes take"]["reached"]


def test_times_are_medians_of_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu.timing, "capture", lambda call: call)
    seconds = iter([9.0, 1e-6, 5e-6, 2e-6])  # the first warms up
    monkeypatch.setattr(gpu.timing, "_by_the_gpu", lambda graph: next(seconds))
    assert gpu.by_graph(lambda: None, repeats=3) == pytest.approx(2)
    assert 1e4 < gpu.eager(lambda: time.sleep(0.01), seconds=0.05) < 1e6


def test_what_there_was_no_time_for_is_named(tmp_path: Path) -> None:
    gpu.run_figure("search", tmp_path, 0.0, quick=False)
    found = read(tmp_path / "search.json")
    assert found["rows"] == []
    assert found["left out"][0] == "1600, 400, 256, float32"
    assert len(found["left out"]) == 2 * len(gpu.SEARCHES) == 2 * 4 * 4 * 3


def test_the_step_is_compared_with_its_peer(tmp_path: Path) -> None:
    file = gpu.File(tmp_path / "step.json")
    found = gpu.compare_with_aims({"eager step over vector-quantize-pytorch": 0.3})
    line = {"value": 0.3, "aim": 0.25, "reached": False}
    assert found == {"eager step over vector-quantize-pytorch": line}
    assert file.content["rows"] == []


def test_a_farther_code_is_found() -> None:
    x, codebook = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[0.0], [3.0], [3.0]])
    least = search.least_distance(x, codebook)
    assert torch.equal(least, torch.tensor([0.0, 1, 1, 0]).double())
    assert gpu.farther(x, codebook, torch.tensor([0, 0, 2, 1]), least) == 0
    assert gpu.farther(x, codebook, torch.tensor([0, 0, 0, 1]), least) == 0.25


def test_a_process_ends_when_its_time_is_up() -> None:
    code = "import time; print('here', flush=True); time.sleep(60)"
    start = time.time()
    status, said = gpu.run_apart([sys.executable, "-c", code], start + 3)
    assert time.time() - start < 30
    assert status == gpu.KILLED
    assert said.startswith("here")
    assert gpu.run_apart([sys.executable, "-c", "print(3); exit(4)"], start + 60) == (4, "3\n")


@pytest.mark.parametrize("status", [0, 1])
def test_failed_tests_are_named(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], until: float) -> tuple[int, str]:
        (path,) = (x.removeprefix("--junitxml=") for x in command if x.startswith("--junitxml="))
        text = REPORT if status else REPORT.replace("failure", "skipped")
        Path(path).write_text(text)
        return status, "said"

    monkeypatch.setattr(gpu, "run_apart", run)
    assert gpu.run_tests(tmp_path, 0.0, workers=1) == (status == 0)
    found = read(tmp_path / "tests.json")
    assert (found["passed"], found["failed"], found["skipped"]) == (1, status, 2 - status)
    assert found["rows"] == [{"test": "tests.a::test_two", "said": "long"}] * status


def test_tests_that_end_early_did_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "run_apart", lambda command, until: (gpu.KILLED, "so far"))
    assert not gpu.run_tests(tmp_path, 0.0, workers=8)
    found = read(tmp_path / "tests.json")
    assert (found["status"], found["said"]) == (gpu.KILLED, "so far")


CLEAN = f"{gpu.RAN}\n========= ERROR SUMMARY: 0 errors\n"
RACES = f"{gpu.RAN}\n========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"


@pytest.mark.parametrize(
    ("said", "sound", "left_out"),
    [
        ([(0, gpu.RAN), (0, CLEAN), (0, CLEAN)], True, []),
        ([(0, gpu.RAN), (0, CLEAN), (9, RACES)], False, []),
        ([(0, gpu.RAN), (0, gpu.RAN), (0, CLEAN)], False, []),
        ([(1, "Traceback"), (0, CLEAN), (0, CLEAN)], False, []),
        ([(0, gpu.RAN), (0, CLEAN), (gpu.KILLED, "half")], True, ["racecheck"]),
    ],
    ids=["clean", "races", "no summary", "it fails by itself", "no time"],
)
def test_what_the_sanitizer_says(
    said: list[tuple[int, str]],
    sound: bool,
    left_out: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = iter(said)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(gpu, "run_apart", lambda *_, **__: next(answers))
    monkeypatch.setattr(gpu, "_driver", lambda: None)
    assert gpu.run_sanitizer(tmp_path, time.time() + 100) == sound
    found = read(tmp_path / "sanitizer.json")
    assert found["left out"] == left_out
    assert [row["tool"] for row in found["rows"]] == ["none", "memcheck", "racecheck"]


def test_without_the_sanitizer_nothing_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.run_sanitizer(tmp_path, 0.0)
    assert read(tmp_path / "sanitizer.json")["left out"][0].startswith("all: compute-sanitizer")


@WITHOUT
def test_every_operation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.run_every_operation("cpu")
    assert capsys.readouterr().out == f"{gpu.RAN}\n"
