"""What clips are about: the ten digits, or 21 two-digit numbers, as names, sounds and figures.

The numbers are those from 12 to 39 whose first digit is smaller than their second, so that the
order of the two figures does not matter. They have parts in common, and some sound alike: "sixteen"
and "twenty-six", "thirteen" and "thirty-four".
"""

from __future__ import annotations

from typing import NamedTuple


class Things(NamedTuple):
    """The classes of a set, one entry for each.

    Attributes:
        names: Their names in a sentence.
        sounds: Their phonemes, keys of `speech.PHONEMES`.
        figures: The digits to write, one or two.
        frames: Frames of 10 ms that the longest of their sounds takes.
    """

    names: tuple[str, ...]
    sounds: tuple[str, ...]
    figures: tuple[tuple[int, ...], ...]
    frames: int


DIGITS = Things(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    (
        "Z IY R OW",
        "W AH N",
        "- T UW",
        "TH R IY",
        "F AO R",
        "F AA IH V",
        "S IH - K S",
        "S EH V AH N",
        "EY IH - T",
        "N AA IH N",
    ),
    tuple((digit,) for digit in range(10)),
    70,
)
_TEENS = {  # of those that are not a digit and "teen"
    2: ("twelve", "- T W EH W V"),
    3: ("thirteen", "TH AH - T IY N"),
    5: ("fifteen", "F IH F - T IY N"),
    8: ("eighteen", "EY IH - T IY N"),
}
_TENS = {2: ("twenty", "- T W EH N T IY"), 3: ("thirty", "TH AH - T IY")}


def _number(ten: int, one: int) -> tuple[str, str]:
    """The name and the phonemes of a number."""
    name, sound = DIGITS.names[one], DIGITS.sounds[one]
    if ten == 1:
        return _TEENS.get(one, (f"{name}teen", f"{sound} - T IY N"))
    return f"{_TENS[ten][0]} {name}", f"{_TENS[ten][1]} {sound}"


_PAIRS = tuple((ten, one) for ten in range(1, 4) for one in range(ten + 1, 10))
NUMBERS = Things(*zip(*(_number(*pair) for pair in _PAIRS), strict=True), _PAIRS, 98)
