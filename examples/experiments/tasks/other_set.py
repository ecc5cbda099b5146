"""The second data set of the tasks that need one."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from cmg import digits
from cmg.data import Clips, load_clips
from cmg.digits import clips as plots
from cmg.errors import DataError

if TYPE_CHECKING:
    from ..run import TrainedRun


def other_set(run: TrainedRun, other: Clips | None) -> Clips:
    """The set that was given, or else the digits of another house, checked against the run.

    Raises:
        DataError: It shares fewer than two modalities with the run, or one of another shape.
    """
    if other is None:
        names = [name for name in run.config.shapes if name in plots.MODALITIES]
        other = load_clips(digits.load_away(), names)
    for name in (shared := [name for name in other.features if name in run.config.shapes]):
        here, there = (list(clips.features[name].shape[1:]) for clips in (run.clips, other))
        if here != there:
            raise DataError(
                f"{name}: a second data set must have the run's shape {here}; came {there}."
            )
    if len(shared) < 2:
        raise DataError(
            f"a second data set must have two of the run's modalities "
            f"({' '.join(run.config.shapes)}); came {' '.join(other.features)}."
        )
    return dataclasses.replace(other, features={name: other.features[name] for name in shared})
