"""Two houses that make such clips: other hands, other voices, other words, another layout.

HOME made the built-in set. AWAY shows the same ten digits in its own way, for tests of what still
holds on another data set. Its hands lean to the right and write narrow digits, and its camera puts
them anywhere, in front of stripes. Its speakers are small, breathy and slow, in rooms that echo.
Its sentences are long. Its events are shorter, and more often there is something else besides.
How far it goes was chosen by what an encoder that is trained on HOME still tells there: less, but
not nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

Range = tuple[float, float]


@dataclass(frozen=True)
class Style:
    """How a house makes its clips.

    Attributes:
        name: In the names of files; none for HOME.
        length: The shortest and the longest event, in segments.
        distracted: How probably a modality shows a second digit outside of the event.
        slant: Columns that a stroke moves to the right per row that it goes down.
        narrow: Width of the handwriting relative to its height.
        size: Width of a digit's square in pixels.
        centre: Row and column of its centre in pixels.
        stroke: Threshold on the ink: low is thick.
        striped: Stripes for a background, else outlines.
        pitch: Of the average speaker, in Hz.
        tract: Length of the average vocal tract, relative to HOME's.
        pace: Speed of speech.
        breath: Share of breath in a voice.
        echo: Amplitude of what comes back from the walls.
        sentence: What is said around a template, in place of {}.
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
