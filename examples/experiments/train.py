"""Run an experiment: for every seed, pre-train, save the model, and write scores as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmg.batches import Batches
from cmg.clips import PRETRAIN, TEST, TRAIN
from cmg.digits import VERSION
from cmg.errors import DataError
from cmg.evaluation import evaluate
from cmg.files import in_use, make_writable, write_atomic
from cmg.heads import Codes
from cmg.model import Config
from cmg.report import code_counts, codebook_summary
from cmg.run import TrainedRun
from cmg.standardize import Standardizer
from cmg.stored import save_run
from cmg.training import CHECKPOINT, Recipe, Trainer

from . import data
from .followups import all_followups
from .matrix import CLIPS, CLUB, RECIPE, Experiment, tasks_of
from .systems import build
from .tasks import all_tasks
from .tasks.picture import draw_segmentation

ALIGNMENT = 1.0  # weight of the alignment of a system


class SystemTrainer(Trainer):
    """A trainer with the term "alignment", and without a progress bar."""

    quiet = True

    def _weights(self) -> dict[str, float]:
        return super()._weights() | {"alignment": ALIGNMENT}


def identity(experiment: Experiment, seed: int) -> dict[str, Any]:
    """The settings of a run, stored in its result; with other settings it is run again."""
    return {**experiment.json(), "seed": seed, "rendering": VERSION, "recipe": RECIPE}


def run_name(experiment: Experiment, seed: int) -> str:
    """The name of a run, for the file of its result and the folder of its model."""
    return f"{experiment.name}-seed{seed}"


def read_result(path: Path) -> dict[str, Any]:
    """Read a result that `train` wrote; empty if there is no file.

    Raises:
        DataError: The file is not a result.
    """
    if not path.is_file():
        return {}
    try:
        match json.loads(path.read_text()):
            case {"identity": {"name": _, "seed": _}, **_rest} as result:
                return result
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a result, or cut short ({error}).") from error
    raise DataError(f"{path}: not a result of an experiment.")


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result atomically, with numbers rounded to six digits."""
    text = json.dumps(_rounded(result), indent=1, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def train(experiment: Experiment, seeds: Sequence[int], results: Path, runs: Path) -> None:
    """Pre-train with each seed, and score the model on held-out clips after the last epoch."""
    torch.set_num_threads(1)
    clips = data.load(experiment)
    standardizer = Standardizer.fit(clips)
    batches = Batches(clips, standardizer)
    config = Config.of(batches, **experiment.settings())
    repeats = 1 if experiment.clips is None else CLIPS / experiment.clips
    recipe = Recipe(epochs=round(experiment.epochs * repeats), segments=1.0, cpc=1.0, club=CLUB)
    for seed in seeds:
        began, name = time.monotonic(), run_name(experiment, seed)
        make_writable(runs / name)
        with in_use(runs / name):
            torch.manual_seed(seed)
            model = build(config, experiment.alignment)
            trainer = SystemTrainer(
                model, batches, clips.rows(PRETRAIN), clips.rows(TRAIN), recipe, runs / name, {}
            )
            trainer.fit()
            (runs / name / CHECKPOINT).unlink()  # no longer needed

            indices, codebook = model.quantize(batches), model.quantizer.codebook
            codes = {m: Codes(i, codebook) for m, i in indices.items()}
            held_out = {m: i[clips.rows(TEST)] for m, i in indices.items()}
            result = {
                "identity": identity(experiment, seed),
                **evaluate(codes, indices, clips, len(codebook)),
                "codebook": codebook_summary(held_out, len(codebook)),
                "codes": _code_map(codebook, held_out),
                "seconds": time.monotonic() - began,
            }
            save_run(runs / name, model, standardizer, clips)
            write_result(results / f"{name}.json", result)


def evaluate_stored(
    experiment: Experiment, seeds: Sequence[int], results: Path, runs: Path
) -> None:
    """Score stored models on more tasks; draw the segmentation of the first seed, if it is one."""
    torch.set_num_threads(1)
    clips, names = data.load(experiment), tasks_of(experiment)
    tasks = all_tasks | all_followups
    for seed in seeds:
        name = run_name(experiment, seed)
        run = TrainedRun.load(runs / name, clips, seed)
        scores = {task: tasks[task](run) for task in names}
        path = results / f"{name}.json"
        write_result(path, read_result(path) | {"tasks": scores})
        if "segmentation" in names and seed == seeds[0]:
            draw_segmentation(run, results / f"{name}.png")


def _code_map(codebook: Tensor, indices: Mapping[str, Tensor]) -> dict[str, Any]:
    """The codes on two principal axes, and how often each modality chose each (Fig. 4)."""
    counts = code_counts(indices, len(codebook))
    used = torch.stack(list(counts.values())).sum(0) > 0
    seen = codebook[used]
    axes = torch.linalg.svd(seen - seen.mean(0), full_matrices=False).Vh[:2]
    plane = (codebook - seen.mean(0)) @ axes.T  # [L, 2]
    return {
        "plane": [" ".join(f"{x:.3f}" for x in axis) for axis in plane.T.tolist()],
        "counts": {name: " ".join(map(str, n.tolist())) for name, n in counts.items()},
    }


def _rounded(value: Any) -> Any:
    match value:
        case float():
            return round(value, 6)
        case Mapping():
            return {key: _rounded(child) for key, child in value.items()}
        case list() | tuple():
            return [_rounded(child) for child in value]
        case _:
            return value
