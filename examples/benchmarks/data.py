"""What a clip costs in each stage of training from disk, on one process and on several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .memory import ROOT

SHAPES = {"audio": (10, 128), "video": (10, 7, 7, 512)}  # of a clip
CLIPS, BATCH, STEPS = 256, 64, 12
QUICK = {"audio": (4, 8), "video": (4, 2, 2, 16)}
PROCESSES = (1, 2, 4)


def run(
    *, quick: bool = False, threads: int = 1, repeats: int = 5
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of stages for each number of processes, and rows of whole epochs on one."""
    shapes, clips, batch, steps = (QUICK, 32, 8, 2) if quick else (SHAPES, CLIPS, BATCH, STEPS)
    stages: list[dict[str, Any]] = []
    epochs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), shapes, clips)
        for processes in PROCESSES:
            settings = {"folder": folder, "batch_size": batch, "steps": steps, "repeats": repeats}
            found = launch(processes, threads, settings)
            for clock, times in found["stages"].items():
                stages.append({"processes": processes, "clock": clock, **_short(times)})
            epochs += [_short(row) for row in found.get("epochs", [])]
    return stages, epochs


def write(folder: Path, shapes: dict[str, tuple[int, ...]], clips: int) -> None:
    """A folder of clips: float16 noise, and labels of two classes; three quarters are split 0."""
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, (clips, *shape))
        for clip in array:
            clip[:] = rng.standard_normal(shape, np.float32)
        array.flush()  # a page that is not on the disk cannot be dropped from memory
    np.save(folder / "labels.npy", np.arange(clips) % 2)
    split = np.repeat([0, 1, 2], [clips - clips // 4, clips // 8, clips // 4 - clips // 8])
    np.save(folder / "split.npy", split)


def launch(processes: int, threads: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What `stages.measure` finds on this number of processes."""
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command += ["benchmarks.stages", json.dumps(settings)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)}
    out = subprocess.check_output(command, cwd=ROOT, env=environment, text=True)
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Floats with two decimals."""
    return {name: round(x, 2) if isinstance(x, float) else x for name, x in row.items()}
