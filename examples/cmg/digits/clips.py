"""The plot of a clip: which class each modality shows in each of its ten segments.

All modalities show the clip's class during the same segments, the event. Outside of it, a modality
may show another class, which no other modality shows. All other segments are background. In the
style NUMBERS the event of each modality is moved, and some of its segments are missing. For
example, of the digits, with "." for background:

    video  . . 4 4 4 4 . 9 9 .
    audio  . . 4 4 4 4 . . . .
    text   1 . 4 4 4 4 . . . .
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..clips import BACKGROUND
from .style import HOME, Style

SEGMENTS = 10
MODALITIES = ("audio", "video", "text")


class Clip(NamedTuple):
    """One clip: its class, and the class of every segment of each modality."""

    label: int
    shown: dict[str, np.ndarray]  # modality -> int64 [T], BACKGROUND where none is shown


def compose(rng: np.random.Generator, style: Style = HOME) -> Clip:
    """Draw the plot of one clip."""
    shortest, longest = style.length
    label, *others = (int(thing) for thing in rng.permutation(len(style.things.names)))
    length = int(rng.integers(shortest, longest + 1))
    start = int(rng.integers(0, SEGMENTS - length + 1))
    shown = {}
    for modality, other in zip(MODALITIES, others, strict=False):
        things = np.full(SEGMENTS, BACKGROUND, dtype=np.int64)
        begin = start
        if style.shifted:
            begin += int(rng.integers(-style.shifted, style.shifted + 1))
            begin = min(max(begin, 0), SEGMENTS - length)
        things[begin : begin + length] = label
        if style.missed:
            missing = rng.random(length) < style.missed
            missing[rng.integers(length)] = False  # it shows the event at least once
            things[begin : begin + length][missing] = BACKGROUND
        if rng.random() < style.distracted:
            things[aside(rng, begin, length)] = other
        shown[modality] = things
    return Clip(label, shown)


def aside(rng: np.random.Generator, start: int, length: int) -> slice:
    """Choose a run of segments before or after the event, shorter than the event."""
    gaps = [gap for gap in ((0, start), (start + length, SEGMENTS)) if gap[0] < gap[1]]
    low, high = gaps[rng.integers(len(gaps))]
    run = int(rng.integers(1, min(high - low, length - 1, 3) + 1))
    first = int(rng.integers(low, high - run + 1))
    return slice(first, first + run)
