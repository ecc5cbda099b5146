"""Classification across modalities and sets with common classes (UCF <-> VGGSound, Table 3).

A head is trained on one modality of one set and tested on another modality of the other set. Only
clips of the classes that both sets have are used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmg.clips import TEST, TRAIN, Clips
from cmg.evaluation import Labelled, Scores, clip_scores, transfer
from cmg.heads import Head, over_time
from cmg.run import TrainedRun

from .sets import away, between_sets, encode


def classify_unpaired(
    run: TrainedRun,
    first: Clips | None = None,
    second: Clips | None = None,
    classes: Sequence[int] = range(2, 17),
) -> dict[str, Scores]:
    """Classify clips across two sets, both ways and in every direction.

    Args:
        run: The run.
        first: Clips of one set. None is the run's own clips.
        second: Clips of another set. None is the numbers in style AWAY.
        classes: Classes that both sets have.

    Returns:
        {"first->second" and "second->first": {"a->b": "accuracy", "chance", and the bounds of
        `between_sets`}}.

    Raises:
        DataError: A set does not fit the model.
    """
    first = run.clips if first is None else first
    second = away(run) if second is None else second
    shared = torch.tensor(sorted(classes))
    coded = [(encode(run, clips), clips) for clips in (first, second)]
    train, test = (
        [_part(codes, clips, split, shared) for codes, clips in coded] for split in (TRAIN, TEST)
    )
    heads = (Head.fit, clip_scores)
    found: dict[str, Scores] = {}
    for way, source, target in (("first->second", 0, 1), ("second->first", 1, 0)):
        across = transfer(train[source], test[target], *heads)
        within = transfer(train[target], test[target], *heads)
        found[way] = between_sets(across, within, "accuracy")
    return found


def _part(codes: dict[str, Tensor], clips: Clips, split: int, shared: Tensor) -> Labelled:
    """The clips of a split and of the shared classes, which are renumbered."""
    rows = clips.rows(split)
    rows = rows[torch.isin(clips.labels[rows], shared)]
    labels = torch.searchsorted(shared, clips.labels[rows])
    described = {name: over_time(x[rows]) for name, x in codes.items()}
    return Labelled(described, dict.fromkeys(codes, labels))
