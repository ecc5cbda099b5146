"""Two styles of rendering, which differ in handwriting, voices, sentences and layout.

HOME is the style of the built-in set. AWAY renders the same ten digits differently, to test
generalisation to another data set: narrow handwriting that leans to the right, anywhere in the
frame, in front of stripes; high, breathy and slow voices with an echo; longer sentences; shorter
events and more distractors. The difference was chosen such that an encoder trained on HOME
recognises the digits of AWAY less well, but above chance.
"""

from __future__ import annotations

from dataclasses import dataclass

Range = tuple[float, float]


@dataclass(frozen=True)
class Style:
    """Parameters of the rendering.

    Attributes:
        name: Name that the random numbers depend on; empty for HOME.
        length: Shortest and longest event, in segments.
        distracted: Probability that a modality shows a second digit outside the event.
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
    length: tuple[int, int] = (3, 7)
    distracted: float = 0.3
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
AWAY = Style(
    name="away",
    length=(2, 6),
    distracted=0.5,
    slant=-0.2,
    narrow=0.9,
    size=(22, 30),
    centre=(17, 39),
    stroke=(0.25, 0.45),
    striped=True,
    pitch=230,
    tract=0.85,
    pace=(0.7, 0.85),
    breath=(0.2, 0.5),
    echo=0.4,
    sentence="so they heard that {} and left",
)
