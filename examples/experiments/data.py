"""The clips of an experiment: all or a part of a data set, and a fourth modality for the digits.

The fourth modality, "display", is for training with more than three modalities. It is a
seven-segment display of the digit, measured by 64 noisy sensors. It follows the plots of the other
modalities: it shows the digit of the event, and outside of it another digit, with the same
probability as they do. A lit segment of the display is 1 and a dark one 0. Noise is added, the
seven values are mixed by a random matrix and a hyperbolic tangent, and every clip has its own gain.
The display is dark in background segments.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from cmg.clips import BACKGROUND, PRETRAIN, Clips
from cmg.digits import clips as plots
from cmg.digits.style import HOME
from cmg.errors import DataError
from cmg.sources import open_data

from .matrix import Experiment

DISPLAY = "display"
SENSORS = 64
_UNUSED = 4  # a split that is not used
_STREAM = 4  # random stream of the display; streams 0 to 3 render the clip
_LIT = ("abcdef", "bc", "abdeg", "abcdg", "bcfg", "acdfg", "acdefg", "abc", "abcdefg", "abcdfg")
_PATTERNS = np.array([[bar in lit for bar in "abcdefg"] for lit in _LIT], dtype=np.float32)


def load(experiment: Experiment) -> Clips:
    """Load the clips of an experiment, for training and test."""
    names = [name for name in experiment.modalities if name != DISPLAY]
    _, clips = open_data(experiment.data, names)
    if DISPLAY in experiment.modalities:
        clips = with_display(clips, experiment.data)
    if experiment.clips is not None:
        split = clips.split.clone()
        split[clips.rows(PRETRAIN)[experiment.clips :]] = _UNUSED
        clips = replace(clips, split=split)
    return clips


def with_display(clips: Clips, data: str) -> Clips:
    """Add the fourth modality to the clips of a rendering of the digits.

    Raises:
        DataError: `data` is not "digits" or "digits:SEED".
    """
    kind, _, seed = data.partition(":")
    if kind != "digits":
        raise DataError(f"{data}: {DISPLAY} shows digits only. Hint: --data digits.")
    mix = np.random.default_rng(0).normal(size=(7, SENSORS)).astype(np.float32)
    shown = np.empty((len(clips.split), plots.SEGMENTS), np.int64)
    sensed = np.empty((len(clips.split), plots.SEGMENTS, SENSORS), np.float32)
    place = dict.fromkeys(range(3), 0)
    for n, split in enumerate(clips.split.tolist()):
        key = (split, place[split])
        place[split] += 1
        streams = np.random.SeedSequence(int(seed or 0), spawn_key=key).spawn(_STREAM + 1)
        clip = plots.compose(np.random.default_rng(streams[0]))
        rng = np.random.default_rng(streams[_STREAM])
        shown[n] = _plot(clip, rng)
        sensed[n] = _sense(shown[n], mix, rng)
    labels = torch.from_numpy(np.where(clips.split.numpy()[:, None] == PRETRAIN, -1, shown))
    return replace(
        clips,
        features=clips.features | {DISPLAY: torch.from_numpy(sensed)},
        segment_labels=clips.segment_labels | {DISPLAY: labels},
    )


def _plot(clip: plots.Clip, rng: np.random.Generator) -> np.ndarray:
    """The digits that the display shows: the event, and sometimes another digit outside it."""
    together = np.logical_and.reduce([x == clip.label for x in clip.shown.values()])
    shown = np.where(together, clip.label, BACKGROUND)
    if rng.random() < HOME.distracted:
        start, length = int(together.argmax()), int(together.sum())
        taken = {int(digit) for x in clip.shown.values() for digit in x}
        free = [digit for digit in range(plots.CLASSES) if digit not in taken]
        shown[plots.aside(rng, start, length)] = rng.choice(free)
    return shown


def _sense(shown: np.ndarray, mix: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    bars = np.where(shown[:, None] == BACKGROUND, 0, _PATTERNS[shown])  # [T, 7]
    seen = rng.uniform(0.6, 1.4) * (bars + 0.3 * rng.normal(size=bars.shape))
    return np.tanh(seen @ mix) + 0.3 * rng.normal(size=(len(shown), SENSORS))
