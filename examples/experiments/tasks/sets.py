"""What the tasks between two data sets have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from cmg import digits
from cmg.data import Clips, load_clips
from cmg.digits import clips as plots
from cmg.errors import DataError
from cmg.evaluation import Pairs, Scores

if TYPE_CHECKING:
    from ..run import TrainedRun


def away(run: TrainedRun) -> Clips:
    """The digits of another house, in the run's modalities."""
    names = [name for name in run.config.shapes if name in plots.MODALITIES]
    return load_clips(digits.load_away(), names)


def encode(run: TrainedRun, clips: Clips) -> dict[str, Tensor]:
    """Codes [N, T, D] of any clips, in each of their modalities that the run knows.

    Raises:
        DataError: There is no such modality, or one is shaped unlike the run's.
    """
    if clips is run.clips:
        return run.codes[0]
    features = {name: x for name, x in clips.features.items() if name in run.config.shapes}
    if not features:
        raise DataError(
            f"a data set must have modalities of the run ({' '.join(run.config.shapes)}); "
            f"came {' '.join(clips.features)}."
        )
    for name, x in features.items():
        here, there = list(run.clips.features[name].shape[1:]), list(x.shape[1:])
        if here != there:
            raise DataError(f"{name}: a data set must have the run's shape {here}; came {there}.")
    return run.quantize(features)[0]


def between_sets(across: Pairs, within: Pairs, score: str) -> Scores:
    """Name the directions from one set to another and add their bounds.

    Args:
        across: (source, target) -> scores, learned in one set and tested in the other.
        within: The same, learned and tested in the other set.
        score: Which score the bounds bound.

    Returns:
        {"a->b": its scores, "upper_bound" of b within the other set, and, where the first set has
        b too, "same_modality" from b to b: what the change of sets alone leaves}.
    """
    found: Scores = {}
    for (a, b), scores in across.items():
        if a != b:
            same = {"same_modality": across[b, b][score]} if (b, b) in across else {}
            found[f"{a}->{b}"] = scores | same | {"upper_bound": within[b, b][score]}
    return found
