"""Localisation across modalities and data sets (AVE -> AVVP, Table 3).

A linear head is trained to classify segments in one modality of one set. It is tested on another
modality of another set, with other writers, voices, sentences and layout.
"""

from __future__ import annotations

from cmg.clips import TEST, TRAIN, Clips
from cmg.evaluation import Labelled, Scores, segment_classes, segment_scores, transfer
from cmg.heads import Head
from cmg.run import TrainedRun

from .sets import away, between_sets, encode


def localize_across(
    run: TrainedRun, source: Clips | None = None, target: Clips | None = None
) -> Scores:
    """Localise events in another data set, in every direction.

    Args:
        run: The run.
        source: Clips to train on. None is the run's own clips.
        target: Clips to test on, with the same classes. None is the numbers in style AWAY.

    Returns:
        {"a->b": the fields of `segment_scores`, and the bounds of `between_sets` for segment_f1}.

    Raises:
        DataError: A set does not fit the model.
    """
    source = run.clips if source is None else source
    target = away(run) if target is None else target
    learned, held = _labelled(run, source), _labelled(run, target)
    test = held.rows(target.rows(TEST))
    heads = (Head.fit, segment_scores)
    across = transfer(learned.rows(source.rows(TRAIN)), test, *heads)
    within = transfer(held.rows(target.rows(TRAIN)), test, *heads)
    return between_sets(across, within, "segment_f1")


def _labelled(run: TrainedRun, clips: Clips) -> Labelled:
    codes, truth = encode(run, clips), segment_classes(clips)
    return Labelled(codes, {name: truth[name] for name in codes})
