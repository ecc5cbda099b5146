"""Across modality and data set: learn on one set, find events in another (AVE -> AVVP, Table 3).

A linear head learns the class of a segment from one modality of the run's own clips. It is tested
on another modality of clips made by others: other writers, voices, sentences and layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from cmg.data import TEST, TRAIN, Clips
from cmg.evaluation import (
    Labelled,
    Scores,
    directions,
    segment_classes,
    segment_scores,
    transfer,
)

from .other_set import other_set

if TYPE_CHECKING:
    from ..run import TrainedRun


def localize_across(run: TrainedRun, other: Clips | None = None) -> Scores:
    """Localisation in another data set, in every direction.

    Args:
        run: The run.
        other: A set with its modalities and classes; the digits of another house if not given.

    Returns:
        {"a->b": the fields of `segment_scores` and two bounds of segment_f1}: "upper_bound" of a
        head that learns b in the other set itself, and "same_modality" of a head that learns b in
        the run's set: what the change of sets alone leaves.

    Raises:
        DataError: The other set does not fit the run.
    """
    other = other_set(run, other)
    codes, _ = run.quantize(other.features)
    own = _labelled(run.codes[0], run.clips, codes)
    there = _labelled(codes, other, codes)
    test = there.rows(other.rows(TEST))
    classes = 1 + max(run.clips.num_classes, other.num_classes)
    heads = (nn.Linear, segment_scores, classes, run.seed)
    across = transfer(own.rows(run.clips.rows(TRAIN)), test, *heads)
    within = transfer(there.rows(other.rows(TRAIN)), test, *heads)
    scores = directions(across, {"same_modality": "segment_f1"})
    bounded = directions(across, {"upper_bound": "segment_f1"}, within)
    return {way: scores[way] | bounded[way] for way in scores}


def _labelled(codes: Mapping[str, Tensor], clips: Clips, names: Iterable[str]) -> Labelled:
    """The codes and segment labels of these modalities."""
    truth = segment_classes(clips)
    return Labelled({name: codes[name] for name in names}, {name: truth[name] for name in names})
