"""Time calls in turns, so that other load on the machine affects all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

Call = Callable[[], object]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def in_turns(
    calls: Mapping[str, Call], repeats: int, *, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Median milliseconds of each call, by wall clock and processor time (of all threads).

    Each call runs once for warm-up, then all in turn, `repeats` times, in another order each time:
    a call is faster after one that leaves its inputs in the cache. On a GPU each is also replayed
    as a CUDA graph, which excludes the time of the host: "gpu". Calls that cannot be captured have
    no such time.
    """
    spent: dict[str, dict[str, list[float]]] = {name: {} for name in calls}
    graphs = {name: _captured(call) for name, call in calls.items()} if device == "cuda" else {}
    order, shuffle = [*calls.items()], random.Random(0).shuffle
    for turn in range(repeats + 1):
        shuffle(order)
        for name, call in order:
            times = _by_clocks(call, device)
            if graph := graphs.get(name):
                times["gpu"] = _by_the_gpu(graph)
            if turn:
                for clock, seconds in times.items():
                    spent[name].setdefault(clock, []).append(seconds)
    return {
        name: {clock: 1e3 * median(times) for clock, times in clocks.items()}
        for name, clocks in spent.items()
    }


def _by_clocks(call: Call, device: str) -> dict[str, float]:
    start = {clock: read() for clock, read in CLOCKS.items()}
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return {clock: read() - start[clock] for clock, read in CLOCKS.items()}


def _captured(call: Call) -> torch.cuda.CUDAGraph | None:
    """The graph of a call; None if it synchronises."""
    try:
        return capture(call)
    except RuntimeError:
        return None


def capture(call: Call) -> torch.cuda.CUDAGraph:
    """Capture a call, after warm-up on another stream.

    Raises:
        RuntimeError: it synchronises.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def _by_the_gpu(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of a replay with an empty L2 cache."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(1 << 28, dtype=torch.uint8, device="cuda").zero_()
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * start.elapsed_time(end)


def exponents(points: list[dict[str, float]], time_key: str, *sizes: str) -> dict[str, float]:
    """Least-squares fit of `time = c * size_1^a * size_2^b ...`: the exponent of each size."""
    logs = torch.tensor([[1.0, *(p[s] for s in sizes)] for p in points], dtype=torch.float64).log()
    logs[:, 0] = 1
    times = torch.tensor([p[time_key] for p in points], dtype=torch.float64).log()
    fit = torch.linalg.lstsq(logs, times[:, None], driver="gelsd").solution[1:, 0]
    return {size: round(float(power), 2) for size, power in zip(sizes, fit, strict=True)}


def geometric_mean(values: list[float]) -> float:
    """`exp(mean(log))`."""
    return float(torch.tensor(values, dtype=torch.float64).log().mean().exp())
