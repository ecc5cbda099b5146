"""The plot of a clip: which digit each modality shows in each of its ten segments.

One event is shared: the clip's digit is shown, spoken and written during the same 3 to 7 segments.
Outside of it a modality may go its own way, as when a cat is filmed while somebody out of sight is
talking: with probability 0.3, on its own, it shows another digit that no other modality shows.
All the rest is background. For example, with "." for background:

    video  . . 4 4 4 4 . 9 9 .
    audio  . . 4 4 4 4 . . . .
    text   1 . 4 4 4 4 . . . .
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cmg.digits.style import HOME, Style

SEGMENTS = 10
CLASSES = 10
BACKGROUND = -1
MODALITIES = ("audio", "video", "text")


class Clip(NamedTuple):
    """One clip: its class, and per modality the digit of every segment."""

    label: int
    shown: dict[str, np.ndarray]  # modality -> int64 [T], BACKGROUND where no digit is shown


def compose(rng: np.random.Generator, style: Style = HOME) -> Clip:
    """Draw the plot of one clip."""
    shortest, longest = style.length
    label, *others = (int(digit) for digit in rng.permutation(CLASSES))
    length = int(rng.integers(shortest, longest + 1))
    start = int(rng.integers(0, SEGMENTS - length + 1))
    shown = {}
    for modality, other in zip(MODALITIES, others, strict=False):
        digits = np.full(SEGMENTS, BACKGROUND, dtype=np.int64)
        digits[start : start + length] = label
        if rng.random() < style.distracted:
            digits[aside(rng, start, length)] = other
        shown[modality] = digits
    return Clip(label, shown)


def aside(rng: np.random.Generator, start: int, length: int) -> slice:
    """Choose a run of segments before or after the event, always shorter than the event."""
    gaps = [gap for gap in ((0, start), (start + length, SEGMENTS)) if gap[0] < gap[1]]
    low, high = gaps[rng.integers(len(gaps))]
    run = int(rng.integers(1, min(high - low, length - 1, 3) + 1))
    first = int(rng.integers(low, high - run + 1))
    return slice(first, first + run)
