"""Train one model of an experiment and score it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmg.batches import Batches
from cmg.clips import PRETRAIN, TEST, TRAIN, VALIDATION, Clips
from cmg.evaluation import Scores, evaluate
from cmg.heads import Codes, Heads
from cmg.model import Config
from cmg.report import code_counts
from cmg.run import TrainedRun
from cmg.sources import open_data
from cmg.standardize import Standardizer
from cmg.trained import About, TrainedModel
from cmg.training import Recipe, Trainer

from .followups import all_followups
from .matrix import CLIPS, CLUB, EPOCHS, EXPERIMENTS, MAPPED, TASK_SEEDS, Experiment, tasks_of
from .systems import build
from .tasks import all_tasks
from .tasks.picture import draw_segmentation

UNUSED = 4  # a split that is not used


class SystemTrainer(Trainer):
    """A trainer with the term "alignment" and a strength, without a progress bar.

    Args:
        experiment: What is trained.
        strength: Factor of the weights of `Experiment.strengthened`.
        arguments: As of `Trainer`.
    """

    quiet = True

    def __init__(self, experiment: Experiment, strength: float, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.factors = dict.fromkeys(experiment.strengthened(), strength)

    def _weights(self) -> dict[str, float]:
        weights = super()._weights() | {"alignment": 1.0}
        return {name: weight * self.factors.get(name, 1.0) for name, weight in weights.items()}


def measure(
    name: str, strength: float, seed: int, split: int = TEST, pictures: Path | None = None
) -> dict[str, Any]:
    """Pre-train on one rendering, train heads on its split 1, and test them.

    Args:
        name: Name of the experiment.
        strength: Strength of what brings the modalities together.
        seed: Seed of the rendering, of the weights and of the batches.
        split: Clips to test on: VALIDATION to choose the strength, or TEST.
        pictures: Folder of the pictures of seed 0 (Fig. 5).

    Returns:
        "clips" and "segments": direction -> score -> value; "agreement": direction -> share of
        equal codes; "shared", see `shared_codes`; "strength" and "seconds"; and in the test, if the
        experiment has them, the scores of "tasks" and the map of its "codes".
    """
    began, experiment = time.monotonic(), EXPERIMENTS[name]
    clips = _select(_numbers(seed), experiment, split)
    standardizer = Standardizer.fit(clips)
    batches = Batches(clips, standardizer)
    torch.manual_seed(seed)
    model = build(Config.of(batches, **experiment.settings()), experiment.alignment)
    rows = clips.rows(PRETRAIN), clips.rows(TRAIN)
    SystemTrainer(experiment, strength, model, batches, *rows, recipe(experiment), None, {}).fit()

    indices, codebook = model.quantize(batches, clips.rows(TRAIN, TEST)), model.quantizer.codebook
    codes = {m: Codes(i, codebook) for m, i in indices.items()}
    scores = evaluate(codes, indices, clips, len(codebook))
    counts = code_counts({m: i[clips.rows(TEST)] for m, i in indices.items()}, len(codebook))
    result = {
        "clips": _only(scores["classification"], "accuracy", "chance", "upper_bound"),
        "segments": _only(scores["localization"], "segment_f1", "precision", "upper_bound"),
        "agreement": {way: x["share"] for way, x in scores["agreement"].items()},
        "shared": shared_codes(counts),
        "strength": strength,
    }
    if split == TEST:
        names = tasks_of(experiment) if seed < TASK_SEEDS else []
        if names:
            trained = TrainedModel(name, model, standardizer, Heads({}, {}), About.of(clips))
            run, tasks = TrainedRun(clips, seed, trained), all_tasks | all_followups
            result["tasks"] = {task: tasks[task](run) for task in names}
            if pictures and seed == 0 and "segmentation" in names:
                draw_segmentation(run, pictures / f"masks-{name}.png")
        if name in MAPPED and seed == 0:
            result["codes"] = _code_map(codebook, counts)
    return result | {"seconds": time.monotonic() - began}


def recipe(experiment: Experiment) -> Recipe:
    """Settings of training: with fewer clips there are more epochs, so that steps are as many."""
    steps, batch = EPOCHS * (CLIPS // Recipe.batch_size), Recipe.batch_size
    return Recipe(epochs=steps // (experiment.clips // batch), cpc=1.0, club=CLUB)


@lru_cache(maxsize=1)
def _numbers(seed: int) -> Clips:
    """The numbers of a seed. Only those of the last seed are kept in memory."""
    return open_data(f"numbers:{seed}")[1]


def _select(clips: Clips, experiment: Experiment, test: int) -> Clips:
    """The clips of an experiment, with those to test on in split TEST."""
    split = clips.split.clone()
    split[torch.isin(clips.split, torch.tensor([TEST, VALIDATION]))] = UNUSED
    split[clips.split == test] = TEST
    split[clips.rows(PRETRAIN)[experiment.clips :]] = UNUSED
    return replace(clips.only(experiment.modalities), split=split)


def _only(scores: Scores, *names: str) -> Scores:
    return {way: {name: x[name] for name in names} for way, x in scores.items()}


def shared_codes(counts: Mapping[str, Tensor], most: float = 0.8) -> float:
    """Share of the used codes of which no modality has more than 80% (green in Fig. 4)."""
    n = torch.stack([*counts.values()]).double()  # [M, L]
    total = n.sum(0)
    used = total > 0
    return (n[:, used].amax(0) <= most * total[used]).double().mean().item()


def _code_map(codebook: Tensor, counts: Mapping[str, Tensor]) -> dict[str, Any]:
    """The codes on two principal axes, and how often each modality chose each (Fig. 4)."""
    seen = codebook[torch.stack([*counts.values()]).sum(0) > 0]
    axes = torch.linalg.svd(seen - seen.mean(0), full_matrices=False).Vh[:2]
    plane = (codebook - seen.mean(0)) @ axes.T  # [L, 2]
    return {
        "plane": [" ".join(f"{x:.3f}" for x in axis) for axis in plane.T.tolist()],
        "counts": {name: " ".join(map(str, n.tolist())) for name, n in counts.items()},
    }
