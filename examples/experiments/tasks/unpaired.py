"""Across modality between sets that share classes but no clips (UCF <-> VGGSound, Table 3).

One set lends its labels in one modality, the other is tested in another modality. The sets need
not have the same classes: only clips of the classes that both have take part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cmg.data import TEST, TRAIN, Clips
from cmg.evaluation import ClipHead, Labelled, Scores, clip_scores, transfer

from .sets import away, between_sets, encode

if TYPE_CHECKING:
    from ..run import TrainedRun


def classify_unpaired(
    run: TrainedRun,
    first: Clips | None = None,
    second: Clips | None = None,
    classes: Sequence[int] = range(2, 8),
) -> dict[str, Scores]:
    """The class of a clip, from set to set both ways, in every direction.

    Args:
        run: The run.
        first: A set; the run's own clips if not given.
        second: Another; the digits of another house if not given.
        classes: Those that the sets share.

    Returns:
        {"first->second" and "second->first": {"a->b": "accuracy", "chance", and the bounds of
        `between_sets`}}.

    Raises:
        DataError: A set does not fit the run.
    """
    first = run.clips if first is None else first
    second = away(run) if second is None else second
    shared = torch.tensor(sorted(classes))
    coded = [(encode(run, clips), clips) for clips in (first, second)]
    train, test = (
        [_part(codes, clips, split, shared) for codes, clips in coded] for split in (TRAIN, TEST)
    )
    heads = (ClipHead, clip_scores, len(shared), run.seed)
    found: dict[str, Scores] = {}
    for way, source, target in (("first->second", 0, 1), ("second->first", 1, 0)):
        across = transfer(train[source], test[target], *heads)
        within = transfer(train[target], test[target], *heads)
        found[way] = between_sets(across, within, "accuracy")
    return found


def _part(codes: dict[str, Tensor], clips: Clips, split: int, shared: Tensor) -> Labelled:
    """The clips of a split and of the shared classes, which are numbered anew."""
    rows = clips.rows(split)
    rows = rows[torch.isin(clips.labels[rows], shared)]
    labels = torch.searchsorted(shared, clips.labels[rows])
    return Labelled({name: x[rows] for name, x in codes.items()}, dict.fromkeys(codes, labels))
