"""The monitor: its figures against a count by hand, its logs and its warnings."""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import bools, close, rounding, uniform
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmvq import CLUBEstimator, CodebookMonitor, HealthWarning, MultiModalEMAQuantizer
from mmvq.monitor import COLLAPSED, MOST, PATIENCE

NAMES = ("video", "audio", "text")
B, T, D, L = 6, 5, 4, 12
EPS = rounding(torch.float32, 20, L)  # of a perplexity: a sum of L terms and an exponential


def quantizer(**options: Any) -> MultiModalEMAQuantizer:
    torch.manual_seed(0)
    return MultiModalEMAQuantizer(D, L, NAMES, **options)


def batch(seed: int, *names: str) -> dict[str, Tensor]:
    return {
        name: uniform(B, T, D, dtype=torch.float32, seed=100 * seed + i)
        for i, name in enumerate(names or NAMES)
    }


def masks(seed: int) -> dict[str, Tensor]:
    return {name: bools(B, T, seed=200 * seed + i) for i, name in enumerate(NAMES)}


def by_hand(outputs: list[dict[str, Tensor]]) -> dict[str, float]:
    """The figures of a window from the indices of its forward passes, position by position."""
    chosen: dict[str, list[int]] = {name: [] for name in NAMES}
    pairs = {(a, b): [0, 0] for i, a in enumerate(NAMES) for b in NAMES[i + 1 :]}
    for indices in outputs:
        for name, index in indices.items():
            chosen[name] += [i for i in index.flatten().tolist() if i >= 0]
        for (a, b), tally in pairs.items():
            if a in indices and b in indices:
                for i, j in zip(indices[a].flatten(), indices[b].flatten(), strict=True):
                    tally[0] += int(i == j >= 0)
                    tally[1] += int(i >= 0 and j >= 0)
    figures: dict[str, float] = {}
    for name, codes in chosen.items():
        shares = [codes.count(code) / len(codes) for code in set(codes)]
        figures[f"perplexity/{name}"] = math.exp(-sum(p * math.log(p) for p in shares))
    kinds = []
    for code in range(L):
        counts = [codes.count(code) for codes in chosen.values()]
        holders = sum(n > 0.05 * sum(counts) for n in counts)
        kinds.append("dead" if not sum(counts) else "shared" if holders > 1 else "single")
    for kind in ("shared", "single", "dead"):
        figures[f"codes/{kind}"] = kinds.count(kind) / L
    return figures | {f"agreement/{a}-{b}": n / total for (a, b), (n, total) in pairs.items()}


def test_a_reading_counts_the_choices_of_its_window() -> None:
    """With masks and a missing modality; eval, freeze and other windows do not count."""
    module = quantizer()
    monitor = CodebookMonitor(module, every=4)
    for window in range(2):
        outputs = []
        for seed in range(4 * window, 4 * window + 4):
            some = NAMES[:2] if seed % 4 == 3 else NAMES
            mask = {name: masks(seed)[name] for name in some}
            outputs.append(module(batch(seed, *some), mask).indices)
            module.eval()(batch(seed))
            module.train()(batch(seed), freeze=True)
            reading = monitor.step()
            assert bool(reading) == (seed % 4 == 3)
        expected = by_hand(outputs)
        assert list(reading) == list(expected)
        for name, value in expected.items():
            assert reading[name] == pytest.approx(value, abs=EPS), name
    assert monitor.history["step"] == [4, 8]
    assert monitor.history["codes/dead"][-1] == reading["codes/dead"]
    assert monitor.usage is not None
    counts = torch.bincount(torch.cat([o["text"][o["text"] >= 0] for o in outputs[:3]]))
    assert torch.equal(monitor.usage.counts["text"][: len(counts)], counts)


def test_a_figure_without_data_is_nan_and_is_not_logged() -> None:
    logged = []
    module = quantizer(commitment=None)
    monitor = CodebookMonitor(module, lambda *args: logged.append(args), every=1)
    ragged = batch(0, "video") | {"audio": uniform(B, T + 2, D, dtype=torch.float32)}
    module(ragged)
    reading = monitor.step()
    nothing = {name for name, value in reading.items() if math.isnan(value)}
    pairs = {"agreement/video-audio", "agreement/video-text", "agreement/audio-text"}
    assert nothing == pairs | {"perplexity/text"}
    assert {name for name, _, _ in logged} == set(reading) - nothing
    module.eval()(batch(0))
    assert monitor.step() == {}
    assert monitor.history["step"] == [1]


def test_logs_to_a_callable_and_to_tensorboard(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    from torch.utils.tensorboard import SummaryWriter

    logged = []
    writer = SummaryWriter(tmp_path)
    histories = []
    for log in (lambda *args: logged.append(args), writer):
        module = quantizer()
        monitor = CodebookMonitor(module, log, every=2)
        monitor.steps = 10  # as after a checkpoint
        for seed in range(4):
            module(batch(seed))
            monitor.step()
        histories.append(monitor.history)
    writer.close()
    assert histories[0] == histories[1]
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    names = [name for name in histories[0] if name != "step"]
    assert sorted(events.Tags()["scalars"]) == sorted(names)
    for name in names:
        wanted = list(zip((12, 14), histories[0][name], strict=True))
        assert [(step, value) for n, value, step in logged if n == name] == wanted
        assert [(e.step, e.value) for e in events.Scalars(name)] == wanted


class NoWaiting(TorchDispatchMode):
    """Forbids operations that synchronise host and device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal"), name
        return func(*args, **kwargs or {})


def test_no_synchronisation_between_readings() -> None:
    module = quantizer(init="uniform")
    club = CLUBEstimator(D, D, 8)
    monitor = CodebookMonitor(module, every=100, club=club)
    z = batch(0)
    with NoWaiting():
        for _ in range(2):
            module(z)
            club.learning_loss(z["audio"], z["text"])
            monitor.step()
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            z["audio"].sum().item()


@pytest.fixture
def compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("compiled")
def test_compiles_into_one_graph_with_the_same_figures() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            options: dict[str, Any] = {"init": "uniform", "partner": "none", "reset_after": None}
            self.quantizer = MultiModalEMAQuantizer(D, L, NAMES[:2], commitment=None, **options)
            self.club = CLUBEstimator(D, D, 8)

        def forward(self, z: dict[str, Tensor]) -> Tensor:
            out = self.quantizer(z)
            return out.loss + self.club.learning_loss(z["audio"], z["video"])

    readings = []
    for compile_it in (True, False):
        model = Model()
        monitor = CodebookMonitor(model.quantizer, every=3, club=model.club)
        forward = torch.compile(model, fullgraph=True, backend="eager") if compile_it else model
        for seed in range(3):
            forward(batch(seed, *NAMES[:2]))
            reading = monitor.step()
        readings.append(reading)
    assert readings[0] == readings[1]
    assert readings[0]["agreement/video-audio"] > 0


def test_a_closed_monitor_no_longer_counts() -> None:
    module, club = quantizer(), CLUBEstimator(D, D, 8)
    monitor = CodebookMonitor(module, every=1, club=club)
    monitor.close()
    module(batch(0))
    club(batch(0)["audio"], batch(0)["text"])
    reading = monitor.step()
    assert math.isnan(reading["agreement/video-audio"])
    assert math.isnan(reading["club/saturated"])
    assert not module._forward_hooks
    assert not club.p_logvar._forward_hooks


def test_reset_clears_everything() -> None:
    module = quantizer(init="uniform")
    monitor = CodebookMonitor(module, every=1)
    module(batch(0))
    monitor.step()
    module(batch(1))
    monitor.reset()
    assert (monitor.steps, monitor.history, monitor.usage) == (0, {}, None)
    assert monitor.read() == {}
    state = deepcopy(module.state_dict())
    again = quantizer(init="uniform")
    again.load_state_dict(state)
    other = CodebookMonitor(again, every=1)
    for m in (module, again):
        m(batch(2))
    assert monitor.step() == other.step()


def test_a_watched_module_is_copied_and_pickled_whatever_the_log() -> None:
    module = quantizer()
    monitor = CodebookMonitor(module, lambda *_: None, every=1)
    copies = [deepcopy(module), pickle.loads(pickle.dumps(module))]
    assert list(module.state_dict()) == list(quantizer().state_dict())
    for copy in copies:
        copy(batch(0))
    assert monitor.step() == {}  # the copies do not count


# health

LIGHT: dict[str, Any] = {"partner": "none", "commitment": None}  # hundreds of steps


def train(monitor: CodebookMonitor, steps: int, z: dict[str, Tensor]) -> list[str]:
    """Train on z for a number of steps, and return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            monitor.quantizer(z)
            monitor.step()
    assert all(w.category is HealthWarning for w in caught)
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


def test_a_collapse_is_warned_of_once_when_it_lasts() -> None:
    module = quantizer(init="uniform", reset_after=None, **LIGHT)
    monitor = CodebookMonitor(module, every=50)
    constant = batch(0) | {"audio": torch.ones(B, T, D)}
    assert train(monitor, PATIENCE - 50, constant) == []
    (text,) = train(monitor, 50, constant)
    assert text.startswith("CodebookMonitor: the codebook collapses")
    assert "perplexity: {'audio': 1.0}   codebook_size: 12\n  Hint: keep reset_after on" in text
    assert train(monitor, PATIENCE + 50, constant) == []
    monitor.reset()
    assert len(train(monitor, PATIENCE, constant)) == 1


def test_a_collapse_that_ends_in_time_is_not_warned_of() -> None:
    monitor = CodebookMonitor(quantizer(reset_after=None, **LIGHT), every=50)
    constant = {"audio": torch.ones(B, T, D)}
    for _ in range(2):
        assert train(monitor, PATIENCE - 50, constant) == []
        assert train(monitor, 50, batch(0)) == []


def test_a_collapse_uses_less_than_5_percent_of_the_reachable_codes() -> None:
    """Even use of k codes of 100 by 100 vectors a step: 4 are a collapse, 6 are not."""
    assert COLLAPSED == 0.05
    for k, warned in ((4, 1), (6, 0)):
        module = MultiModalEMAQuantizer(1, 100, ("a",), init="uniform", reset_after=None, decay=1.0)
        for buffer in (module.ema_codebook.codes, module.ema_codebook.sums):
            buffer.copy_(torch.arange(100.0)[:, None])
        monitor = CodebookMonitor(module, every=PATIENCE)
        z = {"a": torch.arange(100.0).remainder(k)[:, None]}
        assert len(train(monitor, PATIENCE, z)) == warned


@pytest.mark.parametrize(
    ("size", "rows", "options"),
    [
        (64, 40, {"init": "uniform", "reset_after": 50}),  # starts like a collapse
        (64, 40, {"init": "samples"}),
        (2000, 40, {"init": "kmeans"}),  # 96 codes of 100 have no vector
        (64, 1, {"init": "kmeans"}),
        (1, 40, {"init": "kmeans"}),
        (2, 40, {"init": "kmeans"}),
    ],
)
def test_healthy_training_is_not_warned_of(size: int, rows: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = MultiModalEMAQuantizer(D, size, ("audio", "video"), **LIGHT, **options)
    monitor = CodebookMonitor(module, every=20)
    data = {name: uniform(rows, D, dtype=torch.float32) for name in module.modalities}
    assert train(monitor, PATIENCE + 40, data) == []
    assert len(monitor.history["step"]) == PATIENCE / 20 + 2


def test_saturation_is_the_share_of_log_variances_at_the_bound() -> None:
    torch.manual_seed(0)
    club = CLUBEstimator(D, 3, 8, logvar_bound=0.2)
    module = quantizer()
    monitor = CodebookMonitor(module, every=1, club=nn.ModuleDict({"audio": club}))
    x, y = 3 * uniform(B, T, D, dtype=torch.float32), uniform(B, T, 3, dtype=torch.float32)
    mask = bools(B, T)
    beyond = club.posterior(x)[1].abs() > 0.99 * 0.2
    monitor.reset()
    club(x, y, mask)
    club.learning_loss(x, y)
    expected = (beyond[mask].sum() + beyond.sum()) / (3 * (mask.sum() + B * T))
    assert 0 < expected < 1
    close(torch.tensor(monitor.step()["club/saturated/audio"]), expected.item(), EPS)


@pytest.mark.parametrize(("bound", "warned"), [(1.0, 1), (8.0, 0), (None, 0)])
def test_a_saturated_club_is_warned_of(bound: float | None, warned: int) -> None:
    """The data's variance 0.01, of logarithm -4.6, is beyond a bound of 1 (the released code)."""
    torch.manual_seed(0)
    module, club = quantizer(init="uniform"), CLUBEstimator(D, D, 16, logvar_bound=bound)
    monitor = CodebookMonitor(module, every=50, club=club)
    optimizer = torch.optim.Adam(club.parameters(), 1e-2)
    texts: list[str] = []
    for _ in range(12):
        for _ in range(50):
            x = torch.randn(64, D)
            optimizer.zero_grad()
            club.learning_loss(x, x + 0.1 * torch.randn(64, D)).backward()
            optimizer.step()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                monitor.step()
            texts += [str(w.message) for w in caught]
    assert len(texts) == warned
    assert all("CLUB's log-variance lies at its bound" in text for text in texts)
    if bound is None:
        assert monitor.history == {}
    else:
        assert (monitor.history["club/saturated"][-1] > MOST) == bool(warned)
