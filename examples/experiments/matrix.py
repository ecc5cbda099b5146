"""All experiments by name, and the tasks that each is scored on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cmg import model

from .systems import ALIGNMENTS

AV = ("audio", "video")
AVT = ("audio", "video", "text")
CLIPS = 700  # clips of split 0 in a rendering of the digits
EPOCHS = 21
RECIPE = 2  # version of encoders, losses and heads; results of another are measured again
PARTS = tuple(part for part in model.PARTS if part != "contrast")  # of the paper
DCID = ("club", "cpc")

CLUB = 0.02  # weight of CLUB's bound; at 1, as in Sec. 4.4, other losses suffer
PAPER = {  # of codebook and CLUB, as in Sec. 4.2 and 4.3 where the demo departs
    "codebook_size": 128,
    "partner": "attention",
    "partner_weight": 0.5,
    "assignment": "own",
    "club": "bound",
}


@dataclass(frozen=True, eq=False)
class Experiment:
    """Settings of a pre-training, except the seed.

    Attributes:
        name: Name of its results.
        alignment: Objective added to those of Uni-Code, a key of `systems.ALIGNMENTS`.
        modalities: Modalities to train and test on.
        config: Fields of `cmg.model.Config` that differ from those of `PAPER`.
        clips: Number of clips of split 0 to train on, in as many steps as with all of them.
        epochs: Number of epochs, if all clips are used.
        data: Data, as in `cmg_pretrain.py --data`.
    """

    name: str
    alignment: str | None = None
    modalities: tuple[str, ...] = AV
    config: Mapping[str, Any] = field(default_factory=dict)
    clips: int | None = None
    epochs: int = EPOCHS
    data: str = "digits"

    def json(self) -> dict[str, Any]:
        """The settings as stored in the identity of its results."""
        return asdict(self) | {"modalities": list(self.modalities), "config": dict(self.config)}

    def settings(self) -> dict[str, Any]:
        """The fields of `cmg.model.Config` that differ from its defaults."""
        without = {"contrast", *self.config.get("without", ())}
        return {**PAPER, **self.config, "without": tuple(sorted(without))}

    def scaled(self, factor: float) -> Experiment:
        """The same experiment with `factor` times the epochs."""
        return replace(self, epochs=max(1, round(self.epochs * factor)))


def _without(*parts: str) -> dict[str, Any]:
    return {"without": sorted(parts)}


def _systems() -> list[Experiment]:
    """Table 1. Only Uni-Code has reset and MM-EMA; CMCM also has code matching."""
    baseline = [part for part in PARTS if part not in DCID]
    experiments = [Experiment("baseline", config=_without(*PARTS))]
    for name in ALIGNMENTS:
        parts = [part for part in baseline if (name, part) != ("cmcm", "matching")]
        experiments += [
            Experiment(name, name, config=_without(*parts, *DCID)),
            Experiment(f"dcid-{name}", name, config=_without(*parts)),
        ]
    return [*experiments, Experiment("uni-code")]


def _longer(*names: str) -> list[Experiment]:
    """The best systems with twice the epochs, to see if their order changes."""
    return [
        replace(e, name=f"long-{e.name}", epochs=2 * EPOCHS) for e in _systems() if e.name in names
    ]


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
    *(Experiment(f"codes-{L}", config={"codebook_size": L}) for L in (32, 64, 256, 512)),  # Fig. 3
    *(Experiment(f"partner-{kind}", config={"partner": kind}) for kind in ("aligned", "none")),
    Experiment("reset-any", config={"reset_rule": "any"}),
    Experiment("club-shuffled", config={"club_negatives": "shuffled"}),
    *_parts("avt-", AVT, *_SINGLE, _TOGETHER),  # Table 3
    *(Experiment(f"clips-{n}", clips=n) for n in (CLIPS // 4, CLIPS // 2)),
    Experiment("at", None, ("audio", "text")),
    Experiment("vt", None, ("video", "text")),
    Experiment("avtd", None, (*AVT, "display")),
    *_longer("s-mit", "cmcm", "dcid-s-mit", "dcid-cmcm", "uni-code"),
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


def tasks_of(experiment: Experiment) -> list[str]:
    """The tasks that the stored models of an experiment are scored on."""
    return [task for task, names in EVALUATED.items() if experiment.name in names]
