"""All experiments by name: what is trained, and which tasks the trained models are scored on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cmg import model

from .systems import ALIGNMENTS

AV = ("audio", "video")
AVT = ("audio", "video", "text")
CLIPS = 1200  # clips of split 0 of the numbers
EPOCHS = 24  # over all of them
PARTS = tuple(part for part in model.PARTS if part != "contrast")  # of the paper
DCID = ("club", "cpc")
STRENGTHS = (1.0, 3.0, 10.0, 30.0)  # the choices of each, see `Experiment.strengthened`
CHOICE = 100  # seed of the rendering that strengths are chosen on
SEEDS = tuple(range(5))
MORE_SEEDS = tuple(range(5, 10))  # where a claim is open after the others

CLUB = 0.02  # weight of CLUB's bound; at 1, as in Sec. 4.4, other losses suffer
PAPER = {  # of codebook, CLUB and code matching, as in Sec. 4.2 to 4.4 where the demo departs
    "codebook_size": 128,
    "partner": "attention",
    "partner_weight": 0.5,
    "assignment": "own",
    "club": "bound",
    "matching": "clips",
}


@dataclass(frozen=True, eq=False)
class Experiment:
    """Settings of a pre-training, except the seed and the strength.

    Attributes:
        name: Name of its results.
        alignment: Objective added to those of Uni-Code, a key of `systems.ALIGNMENTS`.
        modalities: Modalities to train and test on.
        config: Fields of `cmg.model.Config` that differ from those of `PAPER`.
        clips: Number of clips of split 0 to train on, in as many steps as with all of them.
    """

    name: str
    alignment: str | None = None
    modalities: tuple[str, ...] = AV
    config: Mapping[str, Any] = field(default_factory=dict)
    clips: int = CLIPS

    def settings(self) -> dict[str, Any]:
        """The fields of `cmg.model.Config` that differ from its defaults."""
        without = {"contrast", *self.config.get("without", ())}
        return {**PAPER, **self.config, "without": tuple(sorted(without))}

    def strengthened(self) -> set[str]:
        """The terms whose weights are multiplied by the strength, the one choice of each system.

        They are those that bring the modalities together. The baseline has none; there it is the
        commitment loss.
        """
        without = self.settings()["without"]
        found = {"cpc", "matching"} - {*without} | ({"alignment"} if self.alignment else set())
        return found or {"commitment"}


def _without(*parts: str) -> dict[str, Any]:
    return {"without": sorted(parts)}


def _systems() -> list[Experiment]:
    """Table 1. Of the systems, only Uni-Code has reset and MM-EMA. CMCM has its own matching."""
    others = [part for part in PARTS if part not in DCID]
    experiments = [Experiment("baseline", config=_without(*PARTS))]
    for name in ALIGNMENTS:
        experiments += [
            Experiment(name, name, config=_without(*PARTS)),
            Experiment(f"dcid-{name}", name, config=_without(*others)),
        ]
    return [*experiments, Experiment("uni-code")]


def _parts(
    prefix: str, modalities: tuple[str, ...], *left_out: tuple[str, ...]
) -> list[Experiment]:
    return [
        Experiment(f"{prefix}without-{'-'.join(parts)}", None, modalities, _without(*parts))
        for parts in left_out
    ]


_SINGLE = tuple((part,) for part in PARTS)
_TOGETHER = ("mm-ema", "reset")

ALL = [
    *_systems(),
    *_parts("", AV, *_SINGLE, DCID, _TOGETHER),  # Table 2
    Experiment("avt", None, AVT),
    Experiment("avt-baseline", None, AVT, _without(*PARTS)),
    *_parts("avt-", AVT, *_SINGLE, _TOGETHER),  # Table 3
    *(Experiment(f"codes-{L}", config={"codebook_size": L}) for L in (32, 64, 256, 512)),  # Fig. 3
    *(Experiment(f"clips-{n}", clips=n) for n in (CLIPS // 4, CLIPS // 2)),
    *(Experiment(f"partner-{kind}", config={"partner": kind}) for kind in ("aligned", "none")),
    Experiment("reset-any", config={"reset_rule": "any"}),
    Experiment("club-shuffled", config={"club_negatives": "shuffled"}),
]
EXPERIMENTS = {experiment.name: experiment for experiment in ALL}
TABLE_3 = ("avt-baseline", "avt", *(e.name for e in ALL if e.name.startswith("avt-without")))
EVALUATED: dict[str, tuple[str, ...]] = {  # task -> the experiments whose models it scores
    "across_sets": TABLE_3,
    "unpaired": TABLE_3,
    "segmentation": ("avt-baseline", "avt"),  # Table 4
    "retrieval": ("avt-baseline", "avt"),  # Table 5
    "channels": ("avt",),
    "open_set": ("avt",),
}
TASK_SEEDS = 3  # tasks are scored on the models of the first seeds
MAPPED = ("baseline", "cmcm", "uni-code")  # whose codes are drawn (Fig. 4)


def tasks_of(experiment: Experiment) -> list[str]:
    """The tasks that the models of an experiment are scored on."""
    return [task for task, names in EVALUATED.items() if experiment.name in names]
