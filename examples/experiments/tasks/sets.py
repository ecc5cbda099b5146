"""Common functions of the tasks between two data sets."""

from __future__ import annotations

from torch import Tensor

from cmg import digits
from cmg.clips import Clips
from cmg.data import load_clips
from cmg.digits import clips as plots
from cmg.errors import DataError
from cmg.evaluation import Pairs, Scores
from cmg.run import TrainedRun


def away(run: TrainedRun) -> Clips:
    """Load the numbers in style AWAY, in the modalities of the run."""
    names = [name for name in run.config.shapes if name in plots.MODALITIES]
    return load_clips(digits.load_away(), names)


def encode(run: TrainedRun, clips: Clips) -> dict[str, Tensor]:
    """Codes [N, T, D] of any clips, in the modalities that they share with the run.

    Raises:
        DataError: There is no such modality, or its shape does not fit the model.
    """
    if clips is run.clips:
        return run.codes[0]
    features = {name: x for name, x in clips.features.items() if name in run.config.shapes}
    if not features:
        raise DataError(
            f"a data set must have modalities of the run ({' '.join(run.config.shapes)}); "
            f"got {' '.join(clips.features)}."
        )
    for name in features:
        x = run.clips.features[name]
        clips.require(name, x.shape[1], x.shape[-1], "another data set")
    return run.quantize(features)[0]


def between_sets(across: Pairs, within: Pairs, score: str) -> Scores:
    """Name the directions from one set to another and add their bounds.

    Args:
        across: (source, target) -> scores, trained on one set and tested on the other.
        within: The same, trained and tested on the other set.
        score: Name of the score that the bounds are of.

    Returns:
        {"a->b": its scores, "upper_bound" from b to b within the other set, and, if the first set
        has b, "same_modality" from b to b across sets, which shows the effect of the sets alone}.
    """
    found: Scores = {}
    for (a, b), scores in across.items():
        if a != b:
            same = {"same_modality": across[b, b][score]} if (b, b) in across else {}
            found[f"{a}->{b}"] = scores | same | {"upper_bound": within[b, b][score]}
    return found
