"""Text: sentences that name the digit, and their features, hashed character n-grams.

A sentence is a template filled with a name, a thing and a place. The thing is a class, or a noun in
background segments; some nouns resemble a digit (wine, stone). Every split has its own templates,
names, nouns and places, so that the splits share few words except the digits.

The features of a sentence count the runs of 2 to 5 characters in its words, including the ends of
words: "five" has "<f", "fi", "iv", ..., "<five", "five>". Each is hashed to one of 768 indices and
a sign.
"""

from __future__ import annotations

from functools import cache
from string import ascii_lowercase
from zlib import crc32

import numpy as np

from .style import HOME, Style

WIDTH = 768
# The following tuples are of the splits 0 to 3; a plus sign stands for a space.
NAMES = (
    "anna peter maria jonas ruth victor helen oscar leo sarah the+teacher my+uncle a+child "
    "the+driver our+guest the+king a+lawyer your+cousin the+mayor another+player",
    "julia thomas paul nina edgar sophie martin carla felix judith the+baker her+sister a+nurse "
    "the+captain my+friend the+judge a+pilot their+aunt the+clerk some+tourist",
    "clara hugo irene simon lucy walter emma david agnes boris the+doctor his+father a+singer "
    "the+farmer our+boss the+queen a+painter its+owner the+guard every+student",
    "alice bruno greta felipe rosa martha otto stefan louise henry the+tailor their+son a+dancer "
    "the+gardener my+teacher the+prince a+writer whose+uncle the+waiter one+neighbour",
)
NOUNS = (
    "rain milk bread stone tree wine honey fire salt river glass letter pepper gold wool clay "
    "apple basket button carpet dinner engine feather garlic hat island jacket kettle lemon mirror "
    "needle orange pencil rabbit saddle tiger umbrella violin wallet yoghurt barrel chalk dragon",
    "tea sugar lamp fork bone water juice cotton bill smoke hammer candle rice tow heron soap "
    "anchor bottle camel desk eagle flute grape helmet ink jar kitten leather mango napkin "
    "onion pillow quilt ribbon shovel towel valley wagon yarn blanket cherry dolphin emerald",
    "moon paper ladder copper butter thread nickel wood gravel melody map drive silk dust coal "
    "arrow bucket cactus donkey elbow fiddle goose harbour icing jungle knife lantern magnet "
    "nutmeg oyster parrot rocket spoon tulip vinegar whistle zebra biscuit cradle drum mud",
    "sand cheese stove bush beer syrup mirage pin sugarcane timber comet cart felt linen grass "
    "acorn blossom canoe dagger envelope falcon gravy hinge iron jewel keyhole ladle marble nest "
    "otter pebble quiver raft saucer tractor urn vase walnut yacht zipper crayon dove pine",
)
PLACES = (
    "at+the+window in+the+kitchen on+the+bridge in+the+morning near+the+door under+the+table "
    "before+sunrise at+school inside+the+tent on+monday beyond+the+hill without+a+reason",
    "by+the+river in+the+garden on+the+stairs after+lunch behind+the+house over+the+roofs "
    "during+the+war at+home next+to+me in+april against+the+wall for+a+moment",
    "at+the+station in+the+office on+the+roof before+dinner across+the+street below+the+deck "
    "since+yesterday at+sea outside+the+city in+winter along+the+coast with+great+care",
    "at+the+market in+the+cellar on+the+balcony at+midnight beside+the+road above+the+clouds "
    "until+friday at+church near+the+village in+autumn through+the+forest with+a+smile",
)
TEMPLATES = (
    (
        "{name} says {thing} {place}",
        "the word is {thing} and {name} knows it",
        "{name} writes {thing} {place}",
        "{place} you can see {thing}",
        "someone asks for {thing} and stops",
        "it must be {thing} thinks {name}",
        "there is {thing} {place}",
        "{name} calls out {thing} twice",
        "did {name} ask about {thing}",
        "{thing} came back {place}",
        "{name} remembers {thing} and little else",
        "only {thing} can help us {place}",
    ),
    (
        "{name} reads {thing} aloud {place}",
        "we saw {thing} painted {place}",
        "what {name} wanted was {thing}",
        "{place} hangs {thing}",
        "{name} was looking for {thing}",
        "{thing} is what comes next",
        "nobody but {name} expects {thing}",
        "think of {thing} {place}",
        "{name} drops {thing} {place}",
        "yes {thing} was right says {name}",
        "how often does {thing} occur",
        "{name} would rather have {thing}",
    ),
    (
        "{name} whispers {thing} {place}",
        "here comes {thing} shouts {name}",
        "they found {thing} {place}",
        "{name} draws {thing} with chalk",
        "the card of {name} shows {thing}",
        "give me {thing} please",
        "{place} a sign reads {thing}",
        "{thing} again laughs {name}",
        "look {name} has got {thing} now",
        "where {thing} stood there is an empty page",
        "{name} dreams of {thing} {place}",
        "not {thing} please begs {name}",
    ),
    (
        "{name} explains {thing} {place}",
        "we heard about {thing} {place}",
        "{name} forgot {thing} again",
        "{place} they sell {thing}",
        "has {name} finished {thing} yet",
        "{thing} was on the list of {name}",
        "nothing beats {thing} {place}",
        "{name} points at {thing}",
        "please bring {thing} {place}",
        "{thing} is all that {name} knows",
        "{name} mentions {thing} {place}",
        "this time {thing} belongs to {name}",
    ),
)


def write(
    digits: np.ndarray, split: int, rng: np.random.Generator, style: Style = HOME
) -> list[str]:
    """Write the sentences of one clip: digits [T] to T sentences."""

    def pick(words: str) -> str:
        choices = words.split()
        return choices[rng.integers(len(choices))].replace("+", " ")

    def sentence(digit: int) -> str:
        thing = style.things.names[digit] if digit >= 0 else pick(NOUNS[split])
        template = style.sentence.format(TEMPLATES[split][rng.integers(len(TEMPLATES[split]))])
        text = template.format(name=pick(NAMES[split]), thing=thing, place=pick(PLACES[split]))
        cluttered = style.clutter and rng.random() < style.clutter
        return _misspelt(text, rng) if cluttered else text

    return [sentence(digit) for digit in digits]


def _misspelt(text: str, rng: np.random.Generator) -> str:
    """Replace a quarter of the letters by random ones."""
    letters = np.array([*text])
    wrong = (letters != " ") & (rng.random(len(letters)) < 0.25)
    letters[wrong] = rng.choice(list(ascii_lowercase), wrong.sum())
    return "".join(letters)


def read(sentences: list[str]) -> np.ndarray:
    """Compute the features of T sentences: [T, 768], of unit length."""
    features = np.stack([np.sum([_hash(w) for w in s.split()], axis=0) for s in sentences])
    return features / np.linalg.norm(features, axis=1, keepdims=True)


@cache
def _hash(word: str) -> np.ndarray:
    """Hash the n-grams of one word: [768]."""
    features = np.zeros(WIDTH, dtype=np.float32)
    text = f"<{word}>"
    for n in range(2, 6):
        for start in range(len(text) - n + 1):
            code = crc32(text[start : start + n].encode())
            features[(code >> 1) % WIDTH] += 1 if code & 1 else -1
    return features
