"""The launches of every operation, and what counts them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from types import ModuleType

import pytest
import torch
from torch import Tensor

from benchmarks import command, peers, plot
from mmvq_kernels import operators
from mmvq_kernels.gpu import launching

pytest.importorskip("triton")

from benchmarks import launches

Work = Callable[[Tensor], object]


def calls(work: Work) -> Counter[str]:
    """What `work` launches on a `[3, 4]` without data."""

    def case(device: str) -> launches.Phases:
        x = torch.ones(3, 4, device=device)
        return {"all": lambda: work(x)}

    return launches.counted(case)["all"]


def test_each_call_of_torch_is_a_launch() -> None:
    found = calls(lambda x: (x + 1).relu())
    assert found == {"aten::add": 1, "aten::relu": 1}
    found = calls(lambda x: torch.nn.functional.pad(x.sum(1).bool(), (0, 1)).long().sort())
    assert found == {
        "aten::sum": 1,
        "aten::_to_copy": 2,
        "aten::constant_pad_nd": 2,
        "aten::sort": 3,
    }


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.view(4, 3).T[1:].unsqueeze(0).expand(5, -1, -1).detach().unbind(0),
        lambda x: (x.split(2), x.chunk(2), x.reshape(2, 6), x[:, 1], x.contiguous(), x.to(x)),
        lambda x: (x.new_empty(3), torch.empty_like(x), x.new_empty(1, 3).squeeze_(0)),
        lambda x: x[:0] + 1,
        lambda x: torch.ones(3) + torch.ones(()),
    ],
    ids=["views", "no copies", "empty", "no entries", "on the host"],
)
def test_what_starts_no_kernel(work: Work) -> None:
    assert calls(work) == {}


def test_backward_is_counted() -> None:
    x = torch.ones(3, 4, device="meta", requires_grad=True)
    with launches.as_on_a_gpu() as forward:
        y = (2 * x).sum()
    with launches.as_on_a_gpu() as backward:
        y.backward()
    assert forward.found == {"aten::mul": 1, "aten::sum": 1}
    assert backward.found == {"aten::ones_like": 1, "aten::mul": 1}


def test_an_operator_of_ours_is_its_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of its CUDA path, with the calls of torch around them; an empty grid is none."""

    def kernel() -> None: ...

    def path(x: Tensor, times: int, scale: float) -> None:
        assert (times, scale) == (2, 0.5)
        for grid in [(1, 7)] * times + [(0, 7)]:
            launching.launch(kernel, grid, x.add(1), BLOCK=16)

    def plain(x: Tensor, times: int, scale: float = 0.5) -> Tensor:
        return torch.empty_like(x)

    operator = torch.library.custom_op("mmvq::of_a_test", plain, mutates_args=())
    operator.register_fake(plain)
    module = ModuleType("path_of_a_test")
    vars(module)["path"] = path
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(operators.GPU_PATHS, "mmvq::of_a_test", "path_of_a_test:path")
    assert calls(lambda x: operator(x, 2)) == {"kernel": 2, "aten::add": 3}
    monkeypatch.delitem(operators.GPU_PATHS, "mmvq::of_a_test")
    with pytest.raises(LookupError, match=r"mmvq\.of_a_test\.default: no CUDA path"):
        calls(lambda x: operator(x, 2))


def test_the_library_takes_its_kernels() -> None:
    found = launches.counted(launches.search)["forward"]
    assert found["search_kernel"] == 1
    found = launches.counted(launches.matching)["backward"]
    assert {"pull_kernel", "gradient_kernel"} <= found.keys()
    assert launching.launch.__module__ == launching.__name__  # as it was


def test_what_waits_for_the_device_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        calls(lambda x: x.sum().item())


@cache
def counted(name: str) -> launches.Report:
    return launches.Report({name: launches.counted(launches.CASES[name])}, {})


@pytest.mark.parametrize("name", [*launches.LIMITS, *launches.HELD])
def test_no_more_launches_than_allowed(name: str) -> None:
    assert launches.above_limit(counted(name)) == []


def test_what_is_above_its_limit_is_named() -> None:
    many = Counter({"a": 9, "b": 1})
    few = Counter({"a": 2})
    found = launches.Report({"step": {"forward": many, "backward": few}}, {})
    assert launches.above_limit(found) == ["step, forward: 10 launches, at most 8"]
    found = launches.Report({"step, masks": {"forward": many, "backward": few}}, {})
    assert launches.above_limit(found) == []
    measured = {"step": {"forward": few, "backward": many}}  # by the profiler, which counts more
    found = launches.Report({"step": {"forward": many, "backward": few}}, measured)
    assert launches.above_limit(found) == ["step, backward: 10 launches, at most 3"]


@pytest.mark.filterwarnings("ignore")  # vector-quantize-pytorch's own
@pytest.mark.parametrize("installed", [True, False])
def test_one_object_is_printed(
    installed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if installed:
        pytest.importorskip(launches.THEIRS)
    monkeypatch.setattr("mmvq_kernels.reason_unavailable", lambda _: "it is left alone")
    monkeypatch.setattr(
        launches, "CASES", {n: launches.CASES[n] for n in (*launches.LIMITS, "matching")}
    )
    find = peers.find
    monkeypatch.setattr(peers, "find", lambda name: find(name) if installed else None)
    command.main(["launches"])
    found = json.loads(capsys.readouterr().out)
    names = ["step", "search", "statistics", "eval", "matching", launches.THEIRS]
    assert list(found) == [*names, "details"]
    theirs = found.pop(launches.THEIRS)
    assert (theirs is not None) == installed
    if theirs is not None:
        assert theirs["forward"] > theirs["backward"] > theirs["waits"] > 0
    for name in names[:-1]:
        of = found["details"][name]
        assert found[name] in (
            of["forward"],
            {p: of[p] for p in ("forward", "backward") if p in of},
        )
        for phase, launched in of["launched"].items():
            assert sum(launched.values()) == of[phase] > 0


@pytest.mark.filterwarnings("ignore")  # vector-quantize-pytorch's own
def test_the_page_shows_the_launches() -> None:
    """Paste what this prints."""
    pytest.importorskip(launches.THEIRS)
    counts = {name: launches.counted(case) for name, case in launches.CASES.items()}
    counts[launches.THEIRS] = launches.counted_calls(launches.theirs)
    table = launches.markdown(launches.Report(counts, {}))
    print(table)
    assert table in (plot.ROOT / "docs/benchmarks.md").read_text()


def test_triton_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="triton is not installed"):
        command.main(["launches"])
