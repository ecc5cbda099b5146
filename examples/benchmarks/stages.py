"""Time the stages of training of the example on this process and its ranks; `data` starts it."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmg.batches import Batches
from cmg.clips import PRETRAIN, Clips
from cmg.data import load_clips
from cmg.model import Config, UniCode
from cmg.ranks import is_first, joined, local_part
from cmg.standardize import Standardizer
from cmg.training import Execution, Recipe, Trainer
from mmvq.distributed import average_, world_size

CPU = torch.device("cpu")
CODES = 256
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def measure(folder: str, batch_size: int, steps: int, repeats: int) -> dict[str, Any]:
    """Milliseconds per clip of each stage; on one process also the speed of whole epochs.

    Args:
        folder: The data set.
        batch_size: Clips in a batch, of all ranks together.
        steps: Steps of an epoch.
        repeats: Repeats of each stage and epoch.
    """
    clips = load_clips(folder)
    standardizer = Standardizer.of(clips)
    streamed = Batches(clips, standardizer, in_memory=0)
    in_memory = Batches(clips, standardizer, in_memory=math.inf)
    with joined(CPU):
        found: dict[str, Any] = {
            "stages": stages(clips, standardizer, streamed, batch_size, repeats)
        }
        if world_size() == 1:
            found["epochs"] = epochs(streamed, in_memory, batch_size, steps, repeats)
    return found


def trainer(batches: Batches, batch_size: int, steps: int = 1, workers: int = 0) -> Trainer:
    """A trainer whose only epoch uses all terms of the objective."""
    torch.manual_seed(0)
    model = UniCode(Config.of(batches, codebook_size=CODES))
    rows = batches.clips.rows(PRETRAIN)
    repeated = rows.repeat(math.ceil(steps * batch_size / len(rows)))[: steps * batch_size]
    execution = Execution("fp32", workers=workers)
    recipe = Recipe(epochs=1, batch_size=batch_size)
    found = Trainer(model, batches, repeated, rows, recipe, Path(), {}, execution)
    model.start_codebook(batches, rows, rows)
    model.train()
    return found


def stages(
    clips: Clips, standardizer: Standardizer, streamed: Batches, batch_size: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Median milliseconds per clip: clock -> stage -> until all ranks have done their part.

    The clock "cpu" is the processor time of all ranks together.
    """
    t = trainer(streamed, batch_size)
    model, weights, rows = t.model, t._weights(), clips.rows(PRETRAIN)
    spent: dict[str, dict[str, list[float]]] = {clock: {} for clock in CLOCKS}

    def timed(stage: str, act: Callable[..., Any], *arguments: Any) -> Any:
        _wait()
        start = {clock: read() for clock, read in CLOCKS.items()}
        result = act(*arguments)
        _wait()
        for clock, read in CLOCKS.items():
            spent[clock].setdefault(stage, []).append(read() - start[clock])
        return result

    def standardise(part: Tensor) -> object:
        return [standardizer.apply(name, clips.read(name, part)).half() for name in clips.features]

    def update() -> None:
        nn.utils.clip_grad_norm_(t.others, t.recipe.clip_norm)
        t.optimizer.step()
        t.optimizer.zero_grad()

    def codes(part: Tensor) -> None:
        if is_first():
            model.quantize(streamed, part)

    for _ in range(repeats + 1):  # the first is for warm-up
        chosen = rows[torch.randperm(len(rows))[:batch_size]]
        mine = local_part(chosen)
        forget(streamed)
        timed("standardise", standardise, mine)
        timed("read from disk", streamed.__getitem__, mine)
        batch = timed("read again", streamed.__getitem__, mine)
        timed("losses", t._backward, batch, weights)
        timed("all-reduce", average_, [p.grad for p in t.others if p.grad is not None])
        timed("update", update)
        timed("evaluate", codes, chosen)
    medians = {
        clock: torch.tensor([median(x[1:]) for x in times.values()], dtype=torch.float64)
        for clock, times in spent.items()
    }
    average_(medians.values())
    medians["cpu"] *= world_size()
    scale = 1e3 / batch_size
    return {
        clock: dict(zip(spent[clock], (scale * x).tolist(), strict=True))
        for clock, x in medians.items()
    }


def forget(batches: Batches) -> None:
    """Drop the files from memory, so that they are read from the disk (where the system can)."""
    _wait()
    if batches.clips.folder is None or not hasattr(os, "posix_fadvise"):
        return
    for path in batches.clips.folder.rglob("*.npy"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _wait() -> None:
    if world_size() > 1:
        dist.barrier()


def epochs(
    streamed: Batches, in_memory: Batches, batch_size: int, steps: int, repeats: int
) -> list[dict[str, Any]]:
    """Whole epochs in turns: clips per second, relative to memory, and the share of waiting."""
    ways = [("memory", in_memory, 0), *(("disk", streamed, workers) for workers in (0, 1, 2))]
    trainers = [trainer(batches, batch_size, steps, workers) for _, batches, workers in ways]
    times: list[list[Tensor]] = [[] for _ in ways]
    for _ in range(repeats + 1):  # the first is for warm-up
        for t, spent in zip(trainers, times, strict=True):
            spent.append(epoch(t))
    turns = torch.stack([torch.stack(spent[1:]) for spent in times])  # [way, turn, step, 2]
    whole = turns[..., 0].sum(2)
    speed = (whole[0] / whole).median(1).values
    waiting = (turns[..., 1] / turns[..., 0]).flatten(1).median(1).values
    return [
        {
            "from": place,
            "workers": workers,
            "clips per second": float(steps * batch_size / whole[n].median()),
            "of memory": float(speed[n]),
            "waiting": float(waiting[n]),
        }
        for n, (place, _, workers) in enumerate(ways)
    ]


def epoch(t: Trainer) -> Tensor:
    """Seconds of each step, and of waiting for its batch: [steps, 2]."""
    t.order.shuffle()
    weights, spent = t._weights(), []
    batches = iter(t.loader)
    for _ in range(len(t.order)):
        start = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - start
        t._backward(batch, weights)
        t._step(weights)
        spent.append([time.perf_counter() - start, waited])
    return torch.tensor(spent, dtype=torch.float64)


def main(settings: str) -> None:
    """Print what `measure` finds as a line of JSON."""
    found = measure(**json.loads(settings))
    if is_first():
        print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
