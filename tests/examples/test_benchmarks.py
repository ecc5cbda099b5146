"""The benchmarks run on tiny sizes, compare before they time, and write what they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import command, data, losses, peers, plot, search, stages, step, timing

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "QUICK", ((64, 96), (40, 70), (8,)))
    monkeypatch.setattr(step, "D", 16)
    monkeypatch.setattr(losses, "D", 8)


def test_all_parts_print_and_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads, file = torch.get_num_threads(), tmp_path / "figures.json"
    command.main(["--quick", "--threads", "1", "--repeats", "1", "--output", str(file)])
    torch.set_num_threads(threads)
    results = json.loads(file.read_text())
    runs = {run["part"]: run for run in results["runs"]}
    assert list(runs) == list(command.PARTS)
    printed = capsys.readouterr().out
    for part, run in runs.items():
        assert f"{part}, 1 thread" in printed
        assert run["rows"]
    rows = runs["search"]["rows"]
    assert [(r["N"], r["L"]) for r in rows] == [(64, 40), (64, 70), (96, 40), (96, 70)]
    assert set(runs["search"]["summary"]["cost grows as, for each D"]["8"]) == {"N", "L"}
    assert {"mmvq", "product", "cdist"} <= set(rows[0]["ms"])


def test_no_speed_when_results_disagree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(x: Tensor, codebook: Tensor) -> Tensor:
        return torch.cdist(x, codebook).argmax(1)

    monkeypatch.setattr(peers, "searches", lambda x, codebook: {"wrong": wrong})
    with pytest.raises(SystemExit, match="disagree: wrong: 64 of 64 vectors"):
        command.main(["search", "--quick"])
    assert "|" not in capsys.readouterr().out


def test_error_in_units_of_the_last_place() -> None:
    x, codebook = torch.tensor([[0.0], [9.0]]), torch.tensor([[1.0], [-1.0 - 2**-20], [8.0]])
    least = search.least_distance(x, codebook)
    assert least.tolist() == [1, 1]
    assert search.excess(x, codebook, torch.tensor([0, 2]), least) == 0
    # (1 + 2^-20)^2 = 1 + 2^-19 + 2^-40, and the last place of 1 is 2^-23
    assert search.excess(x, codebook, torch.tensor([1, 2]), least) == 16


def test_faiss_is_left_as_it_was() -> None:
    faiss = pytest.importorskip("faiss")
    before = faiss.cvar.distance_compute_blas_threshold
    x, codebook = torch.randn(30, 4), torch.randn(7, 4)
    ways = peers.searches(x, codebook)
    assert {"faiss", "faiss, threshold 0"} <= set(ways)
    chosen = {name: torch.as_tensor(way(x, codebook)) for name, way in ways.items()}
    search.compare(x, codebook, chosen)
    assert faiss.cvar.distance_compute_blas_threshold == before


def test_without_a_gpu_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(peers, "missing", list)
    command.main(["gpu"])
    assert capsys.readouterr().out == "gpu: torch finds no GPU; nothing was run\n"
    with pytest.raises(SystemExit):
        command.main(["speed"])


def test_training_from_disk_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process."""
    monkeypatch.setattr(data, "PROCESSES", (1,))
    monkeypatch.setattr(data, "launch", lambda _, __, settings: stages.measure(**settings))
    file = tmp_path / "figures.json"
    command.main(["data", "--quick", "--repeats", "1", "--output", str(file)])
    torch.set_num_threads(1)
    (run,) = json.loads(file.read_text())["runs"]
    assert [row["clock"] for row in run["rows"]] == ["wall", "cpu"]
    memory, *disk = run["epochs"]
    assert memory["of memory"] == 1
    assert [row["workers"] for row in disk] == [0, 1, 2]
    assert all(0 <= row["waiting"] < 1 for row in disk)
    printed = capsys.readouterr().out
    assert all(command.table(rows, "wall") in printed for rows in (run["rows"], run["epochs"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "must be at least 1"),
        (["--repeats", "0"], "must be at least 1"),
        (["--output", "no/where.json"], "must be a file in an existing folder"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    said = capsys.readouterr()
    assert said.err.endswith(f"{message}\n")
    assert said.out == ""


def test_the_gpu_part_shows_the_time_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU of straw: what stands around the measurement."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr("mmvq_kernels.available_backends", lambda: ("triton", "torch"))
    monkeypatch.setattr(timing, "_captured", lambda call: "a graph")
    monkeypatch.setattr(timing, "_by_the_gpu", lambda graph: 0.25)
    monkeypatch.setattr(search, "_gpu_memory", lambda x, codebook: 3)
    monkeypatch.setattr(Tensor, "to", lambda x, device: x)
    monkeypatch.setattr(step, "run", lambda **_: [])
    command.main(["gpu", "--quick", "--repeats", "1"])
    printed = capsys.readouterr().out
    assert "gpu: a GPU, mmvq by triton\n" in printed
    assert "medians in ms (gpu clock)" in printed
    assert "| 64 | 40 | 8 | float32 | 3 | 250.00 (0) | 1.00 (0) |" in printed


def test_the_plot_shows_every_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    times = {"mmvq": {"cpu": 1.0, "wall": 2.0}, "product": {"cpu": 1.0, "wall": 1.0}}
    rows = [{"N": n, "L": 7, "D": 8, "dtype": "float32", "ms": times} for n in (5, 50)]
    file = tmp_path / "figures.json"
    search_run = {"part": "search", "rows": rows}
    file.write_text(json.dumps({"clock of the tables": "cpu", "runs": [search_run]}))
    monkeypatch.setattr(plot, "FIGURES", file)
    monkeypatch.setattr(plot, "IMAGE", tmp_path / "figures.svg")
    command.main(["plot"])
    text = plot.IMAGE.read_text()
    labels = ("N = 5, D = 8", "N = 50, D = 8", "mmvq", "product")
    assert all(f"<!-- {label} -->" in text for label in labels)


def over(rows: list[dict[str, Any]], name: str, clock: str) -> list[float]:
    """mmvq's time over that of a peer at each float32 size that has both."""
    found = [row["ms"] for row in rows if row.get("dtype") == "float32" and name in row["ms"]]
    return [ms["mmvq"][clock] / ms[name][clock] for ms in found]


def faster_faiss(rows: list[dict[str, Any]], clock: str) -> list[dict[str, Any]]:
    """With the time of the faster of its ways as that of faiss."""
    found = []
    for row in rows:
        ways = [row["ms"][k] for k in ("faiss", "faiss, threshold 0") if k in row["ms"]]
        fastest = {"faiss": min(ways, key=lambda ms: ms[clock])} if ways else {}
        found.append({**row, "ms": {**row["ms"], **fastest}})
    return found


def test_the_page_shows_the_committed_figures() -> None:
    page = (plot.ROOT / "docs/benchmarks.md").read_text()
    one, two, largest = (
        {run["part"]: run for run in json.loads((plot.FIGURES.parent / file).read_text())["runs"]}
        for file in ("1-thread.json", "2-threads.json", "largest.json")
    )
    for part in ("search", "step", "losses"):
        assert command.table(one[part]["rows"], "cpu") in page
    sizes = [(row["N"], row["L"], row["D"]) for row in one["search"]["rows"]]
    rows = largest["search"]["rows"]
    assert command.table([x for x in rows if (x["N"], x["L"], x["D"]) not in sizes], "cpu") in page
    for row in one["memory"]["rows"]:
        assert f"| {row['MB']} |" in page
    for D, powers in one["search"]["summary"]["cost grows as, for each D"].items():
        assert f"$N^{{{powers['N']}}} L^{{{powers['L']}}}$ at D {D}" in page
    mean = timing.geometric_mean
    words = " ".join(page.split())
    for name in ("cdist", "scikit-learn", "faiss"):
        rows = [faster_faiss(run["search"]["rows"], c) for run, c in ((one, "cpu"), (two, "wall"))]
        found, by_two = (
            [over([row for row in of if row["D"] == D], name, clock) for D in (8, 64, 256)]
            for of, clock in zip(rows, ("cpu", "wall"), strict=True)
        )
        cells = " | ".join(f"{mean(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in found)
        (line,) = (x for x in page.splitlines() if x.endswith(f" | {cells} |"))
        assert name in line
        if name == "faiss":
            told = (f"{mean(x):.2f} at D {D}" for x, D in zip(by_two, (8, 64, 256), strict=True))
            assert all(each in words for each in told)
        else:
            assert f"{mean(over(rows[1], name, 'wall')):.2f} of {name}" in words
    ms = {name: time["wall"] for name, time in two["step"]["rows"][0]["ms"].items()}
    ratio = ms["mmvq"] / ms["vector-quantize-pytorch"]
    told = f"took {ms['mmvq']:.2f} ms, {ratio:.2f} of vector-quantize-pytorch"
    assert told in words


def test_the_guide_shows_the_committed_costs() -> None:
    (run,) = json.loads((plot.FIGURES.parent / "data.json").read_text())["runs"]
    page = (plot.ROOT / "docs/guides/large-data.md").read_text()
    assert all(command.table(rows, "wall") in page for rows in (run["rows"], run["epochs"]))


def test_powers_and_means() -> None:
    points = [{"N": n, "L": k, "t": 3 * n * k**0.5} for n in (2.0, 5, 9) for k in (4.0, 7)]
    assert timing.exponents(points, "t", "N", "L") == {"N": 1.0, "L": 0.5}
    assert timing.geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)


def test_calls_take_turns() -> None:
    order: list[str] = []
    times = timing.in_turns({n: lambda n=n: order.append(n) for n in "ab"}, 9)  # type: ignore[misc]
    turns = ["".join(order[i : i + 2]) for i in range(0, 20, 2)]
    assert set(turns) == {"ab", "ba"}  # in another order each time
    assert all(set(clocks) == {"wall", "cpu"} for clocks in times.values())
