"""Warnings in words about data and runs whose figures mean little."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from .clips import PRETRAIN, TEST, TRAIN, Clips

FEW = 30  # clips of split 2
_CHANCE = 0.95  # of ln B, the loss of a contrast that tells nothing apart
_COLLAPSE = 2.0  # perplexity
_EXPLAINED = 0.5  # share of the specific features that z predicts
_AT_BOUND = 0.5  # share of log-variances at their bound


def about_data(clips: Clips) -> list[str]:
    """What makes scores on these clips mean little."""
    found: list[str] = []
    for name in clips.modalities if clips.labelled else ():
        known, shown = (_classes(clips, name, split) for split in (TRAIN, TEST))
        n = int((clips.labels_of(name)[clips.rows(TEST)] >= 0).sum())
        if n == 0:
            found.append(f"{name}: split 2 has no clip with a label.")
            continue
        if n < FEW:
            found.append(
                f"{name}: split 2 has only {n} clips, so the standard error of an accuracy is up "
                f"to {50 / math.sqrt(n):.0f} points."
            )
        if len(shown) == 1:
            found.append(
                f"{name}: split 2 has a single class, so an accuracy cannot be above chance."
            )
        if missing := sorted(shown - known):
            named = ", ".join(
                clips.class_names[k] if clips.class_names else str(k) for k in missing
            )
            found.append(
                f"{name}: no clip of split 1 has a label of class {named}, but clips of split 2 "
                "do: they will be counted as errors."
            )
    rows = clips.rows(PRETRAIN)
    for a, b in combinations(clips.modalities, 2):
        if not (clips.valid(a, rows) & clips.valid(b, rows)).any():
            found.append(
                f"{a} and {b} are never valid at the same segment in split 0, so nothing brings "
                "their codes together."
            )
    return found


def about_run(
    metrics: Mapping[str, Any],
    history: Mapping[str, Sequence[float]],
    batch_size: int,
    saturation: Mapping[str, float],
) -> list[str]:
    """What went wrong in a run.

    Args:
        metrics: Content of metrics.json.
        history: Quantity -> value of each epoch.
        batch_size: Clips in a batch.
        saturation: Name -> share of CLUB's log-variances at their bound.
    """
    found: list[str] = []
    for name, use in metrics["codebook"]["per_modality"].items():
        if use["perplexity"] < _COLLAPSE:
            found.append(
                f"codebook collapse: {name} uses {use['used']} codes (perplexity "
                f"{use['perplexity']:.1f}). Hint: train for longer, or look at the features."
            )
    for term, named in (("cpc", "Cross-CPC"), ("contrast", "the contrast")):
        if (loss := _last(history, term)) > _CHANCE * math.log(batch_size):
            found.append(
                f"{named} is at chance: its loss is {loss:.2f} of ln {batch_size} = "
                f"{math.log(batch_size):.2f} nats, so modalities do not predict each other. "
                "Hint: check that the rows of all modalities are of the same clips."
            )
    for name, share in saturation.items():
        if share > _AT_BOUND:
            found.append(
                f"CLUB of {name} is at its bound: {share:.0%} of its log-variances, so its "
                "estimate is too low. Hint: --preset digits."
            )
    if not saturation and (explained := _last(history, "club")) > _EXPLAINED:
        found.append(
            f"CLUB: semantic features still predict {explained:.0%} of the modality-specific ones."
        )
    return found


def _classes(clips: Clips, name: str, split: int) -> set[int]:
    labels = clips.labels_of(name)[clips.rows(split)]
    return set(labels[labels >= 0].tolist())


def _last(history: Mapping[str, Sequence[float]], name: str) -> float:
    """The last value; NaN, which is above nothing, if there is none."""
    values = history.get(name, ())
    return values[-1] if values else math.nan
