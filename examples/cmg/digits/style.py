"""Styles of rendering, which differ in classes, timing, handwriting, voices, sentences and layout.

HOME is the style of the built-in digits.

NUMBERS is the style of a harder set, the numbers. Its 21 classes are two-digit numbers. The
modalities do not show an event at quite the same time, and each misses some of its segments; other
numbers appear as often as not; and some segments are cluttered: by a stray digit in the picture, a
hum or siren under the speech, or misspelt words. It has a validation split, which may share a
writer with split 1, but no voice, sentence or noun.

AWAY renders the numbers differently, to test generalisation to another data set: narrow handwriting
that leans to the right, in front of stripes; high, breathy and slow voices with an echo; longer
sentences; shorter events.

SCENES is for segmentation: each frame has two numbers, of which speech and text name one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import things

Range = tuple[float, float]
# Of splits 0, 1 and 2. Consecutive samples are from one writer, about 138 each. The gap of this
# size before split 2 separates its writers from those of all other splits.
WRITERS = (range(0, 900), range(900, 1280), range(1418, 1797))


@dataclass(frozen=True)
class Style:
    """Parameters of the rendering.

    Attributes:
        name: Name that the random numbers depend on; empty for HOME.
        things: The classes.
        length: Shortest and longest event, in segments.
        shifted: Segments that a modality's event is moved by at most, either way.
        missed: Probability that a modality does not show a segment of the event.
        distracted: Probability that a modality shows another class outside the event.
        clutter: Probability that a segment shows, sounds or reads worse, see above.
        pooled: Whether video features are those of the whole frame, not of its cells.
        writers: The samples of handwriting that each split uses.
        slant: Columns that a stroke moves to the right for each row down.
        narrow: Width of the handwriting relative to its height.
        size: Side of a digit's square, in pixels.
        centre: Row and column of its centre, in pixels.
        stroke: Threshold of the ink; a low threshold gives a thick stroke.
        striped: Whether the background has stripes, otherwise outlines.
        pitch: Pitch of the average speaker, in Hz.
        tract: Length of the average vocal tract, relative to that of HOME.
        pace: Speed of speech.
        breath: Share of breath in a voice.
        echo: Amplitude of the echo.
        sentence: Sentence around a template, which replaces {}.
    """

    name: str = ""
    things: things.Things = things.DIGITS
    length: tuple[int, int] = (3, 7)
    shifted: int = 0
    missed: float = 0.0
    distracted: float = 0.3
    clutter: float = 0.0
    pooled: bool = False
    writers: tuple[range, ...] = WRITERS
    slant: float = 0.0
    narrow: float = 1.0
    size: Range = (22, 34)
    centre: Range = (22, 34)
    stroke: Range = (0.25, 0.55)
    striped: bool = False
    pitch: float = 150
    tract: float = 1.0
    pace: Range = (0.8, 1.25)
    breath: Range = (0.02, 0.25)
    echo: float = 0.0
    sentence: str = "{}"


HOME = Style()
NUMBERS = Style(
    name="numbers",
    things=things.NUMBERS,
    shifted=1,
    missed=0.2,
    distracted=0.5,
    clutter=0.3,
    pooled=True,
    writers=(WRITERS[0], range(900, 1100), WRITERS[2], range(1100, 1280)),
    size=(22, 30),
    pace=(1.2, 1.7),
)
AWAY = replace(
    NUMBERS,
    name="numbers-away",
    length=(2, 6),
    slant=-0.2,
    narrow=0.9,
    size=(20, 28),
    centre=(20, 36),
    stroke=(0.25, 0.45),
    striped=True,
    pitch=230,
    tract=0.85,
    pace=(1.1, 1.4),
    breath=(0.2, 0.5),
    echo=0.4,
    sentence="so they heard that {} and left",
)
SCENES = replace(
    NUMBERS, name="numbers-scenes", shifted=0, missed=0.0, distracted=0.0, pooled=False
)
