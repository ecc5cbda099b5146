"""Within one data set: the class of a clip (AVE), the class of a segment (AVVP). Tables 1 to 3.

A segment of a `Clips` shows one event or none, so its head chooses among the classes and the
background. AVVP itself lets a segment show several events: `evaluation.event_localization` is for
labels that do. The "accuracy" published for AVVP is a precision alone; here precision, recall and
F1 stand side by side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmg import evaluation
from cmg.evaluation import Scores

if TYPE_CHECKING:
    from ..run import TrainedRun


def classify(run: TrainedRun) -> Scores:
    """The fields of `evaluation.classification` of the run's own clips."""
    return evaluation.classification(run.codes[0], run.clips, run.seed)


def localize(run: TrainedRun) -> Scores:
    """The fields of `evaluation.localization` of the run's own clips."""
    return evaluation.localization(run.codes[0], run.clips, run.seed)
