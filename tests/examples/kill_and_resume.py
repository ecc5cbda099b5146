"""The example killed at random moments and resumed must end as if it had been left alone.

    PYTHONPATH=.:examples:tests python tests/examples/kill_and_resume.py --kills 30

Each run is a process of its own, ended by SIGKILL after a random part of the time that a whole
run takes: while it reads, trains, writes a checkpoint, evaluates or writes results. It is resumed
until it is done; then everything it wrote must be the undisturbed run's, to the bit. Then the next
run begins.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import cmg_pretrain
import matplotlib.pyplot  # noqa: F401, here, so that no forked run has to
import numpy as np
from examples.conftest import make_arrays

from cmg.checkpoint import load_checkpoint
from cmg.training import CHECKPOINT


def start(data: Path, folder: Path, epochs: int) -> int:
    """A process that runs the example, from its checkpoint if there is one; its id."""
    arguments = ["--data", str(data), "--epochs", str(epochs), "--output", str(folder)]
    if (folder / CHECKPOINT).exists():
        arguments.append("--resume")
    child = os.fork()  # what is imported stays imported: a kill costs no start of python
    if child == 0:
        said = os.open(log(folder), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os._exit(cmg_pretrain.main(arguments))
    return child


def log(folder: Path) -> Path:
    """Where what the last run into `folder` said is kept."""
    return folder.with_name(f"{folder.name}.log")


def finish(child: int, folder: Path) -> None:
    """Wait for a run that nobody disturbs."""
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, log(folder).read_text()


def killed(child: int, folder: Path, after: float) -> bool:
    """Kill a run after this many seconds; False if it was done by then."""
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), log(folder).read_text()
    return code != 0


def results(folder: Path) -> dict[str, object]:
    """All that a run wrote, but for pictures, TensorBoard's log and the time it took."""
    files = {path.name: path for path in folder.iterdir() if path.is_file()}
    metrics = json.loads(files.pop("metrics.json").read_text())
    found = {name: path.read_bytes() for name, path in files.items() if path.suffix != ".png"}
    return {**found, "metrics": {**metrics, "seconds": 0}}


def phase(folder: Path, epochs: int) -> str:
    """How far a killed run had come; its checkpoint, if any, must be whole."""
    if not (folder / CHECKPOINT).exists():
        return "before the first checkpoint"
    done = load_checkpoint(folder / CHECKPOINT)["epoch"]
    return "between checkpoints" if done < epochs else "after training"


def kill_and_resume(kills: int, epochs: int, folder: Path, seed: int = 0) -> Counter[str]:
    """Kill runs so many times; how often in which phase. AssertionError if a result differs."""
    draw = random.Random(seed)
    data = folder / "clips.npz"
    np.savez(data, **make_arrays())
    began = time.monotonic()
    finish(start(data, folder / "whole", epochs), folder / "whole")
    whole = time.monotonic() - began
    expected = results(folder / "whole")
    seen: Counter[str] = Counter()
    for run in itertools.count():
        mine = folder / f"run{run}"
        while seen.total() < kills:
            if not killed(start(data, mine, epochs), mine, draw.uniform(0, whole)):
                break
            seen[phase(mine, epochs)] += 1
        else:
            finish(start(data, mine, epochs), mine)
        found = results(mine)
        assert found.keys() == expected.keys()
        different = [name for name in expected if found[name] != expected[name]]
        assert not different, f"run {run}: {different} differ"
        if seen.total() == kills:
            return seen


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen = kill_and_resume(given.kills, given.epochs, Path(folder), given.seed)
    for name, times in seen.items():
        print(f"killed {name}: {times}")
    print("every run ended as the undisturbed one, to the bit")
