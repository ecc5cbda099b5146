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
from cmg.evaluation import ClipHead, Labelled, Scores, clip_scores, directions, transfer

from .other_set import other_set

if TYPE_CHECKING:
    from ..run import TrainedRun


def classify_unpaired(
    run: TrainedRun, other: Clips | None = None, classes: Sequence[int] = range(2, 8)
) -> dict[str, Scores]:
    """The class of a clip, from set to set both ways, in every direction.

    Args:
        run: The run.
        other: A set with its modalities; the digits of another house if not given.
        classes: Those that the sets share.

    Returns:
        {"own->other" and "other->own": {"a->b": "accuracy", "chance", "same_modality" (b in one set
        to b in the other) and "upper_bound" (b within the set of the test)}}.

    Raises:
        DataError: The other set does not fit the run.
    """
    other = other_set(run, other)
    other_codes, _ = run.quantize(other.features)
    own_codes = {name: run.codes[0][name] for name in other_codes}
    shared = torch.tensor(sorted(classes))
    train, test = (
        [_part(own_codes, run.clips, split, shared), _part(other_codes, other, split, shared)]
        for split in (TRAIN, TEST)
    )
    heads = (ClipHead, clip_scores, len(shared), run.seed)
    found: dict[str, Scores] = {}
    for way, source, target in (("own->other", 0, 1), ("other->own", 1, 0)):
        across = transfer(train[source], test[target], *heads)
        within = transfer(train[target], test[target], *heads)
        scores = directions(across, {"same_modality": "accuracy"})
        bounded = directions(across, {"upper_bound": "accuracy"}, within)
        found[way] = {name: scores[name] | bounded[name] for name in scores}
    return found


def _part(codes: dict[str, Tensor], clips: Clips, split: int, shared: Tensor) -> Labelled:
    """The clips of a split and of the shared classes, which are numbered anew."""
    rows = clips.rows(split)
    rows = rows[torch.isin(clips.labels[rows], shared)]
    labels = torch.searchsorted(shared, clips.labels[rows])
    return Labelled({name: x[rows] for name, x in codes.items()}, dict.fromkeys(codes, labels))
