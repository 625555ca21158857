"""Phrases of captions that can be replaced by one of their kind, and by which, so that no text tells what was planted.

A kind is a list of meanings, a meaning the words for it: a word is replaced by one of another meaning.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

Kind = tuple[tuple[str, ...], ...]


def _kind(words: str) -> Kind:
    """Meanings, one a word, or several words for one with bars between them; "_" stands for a space."""
    return tuple(tuple(word.replace("_", " ") for word in meaning.split("|")) for meaning in words.split())


_NOUNS = {
    "animal": _kind("dog|puppy cat|kitten horse cow bird elephant bear zebra giraffe goat duck monkey rabbit"),
    "vehicle": _kind("car bus truck train bicycle|bike motorcycle|motorbike boat airplane|plane van tram"),
    "fruit": _kind("apple banana lemon pear grape pineapple carrot tomato"),
    "dish": _kind("pizza cake sandwich burger salad soup donut"),
    "furniture": _kind("chair table bed couch|sofa desk bench shelf lamp"),
    "clothing": _kind("hat shirt jacket|coat dress tie scarf glove"),
    "shape": _kind("circle|disc square triangle star cross ring diamond heart rectangle hexagon"),
    "sport": _kind("frisbee kite skateboard surfboard snowboard racket"),
}
_IRREGULAR = {"bus": "buses", "bench": "benches", "couch": "couches", "shelf": "shelves", "puppy": "puppies"} | {
    "tomato": "tomatoes",
    "sandwich": "sandwiches",
    "dress": "dresses",
    "scarf": "scarves",
    "cross": "crosses",
    "dish": "dishes",
    "box": "boxes",
}
KINDS: dict[str, Kind] = {
    "colour": _kind("red blue green yellow black white orange purple|violet pink brown gray|grey cyan magenta"),
    "number": _kind("one two three four five six seven eight nine ten"),
    "size": _kind("large|big|huge small|little|tiny"),
    "side": _kind("left right"),
    "height": _kind("above below upper lower"),
    "depth": _kind("in_front_of behind next_to|beside"),
    "place": _kind("inside outside"),
    "person": _kind("man woman boy girl baby"),
    "people": _kind("men women boys girls babies"),
    "material": _kind("wooden metal plastic leather stone brick"),
    "weather": _kind("sunny cloudy rainy snowy foggy"),
    "room": _kind("kitchen bathroom bedroom office garage"),
    "pose": _kind("sitting|seated standing lying walking|running jumping"),
    "age": _kind("young old|elderly"),
    **_NOUNS,
    **{
        f"{name}s": tuple(tuple(_IRREGULAR.get(word, f"{word}s") for word in words) for words in kind)
        for name, kind in _NOUNS.items()
    },
}
SCALING_STEPS = 400
VOWELS = "aeiou"


@dataclass(frozen=True)
class Slot:
    """A phrase of a caption that can be replaced.

    Attributes:
        start, end: where it stands.
        word: in lower case.
        kind: of it.
    """

    start: int
    end: int
    word: str
    kind: str


@cache
def _pattern() -> re.Pattern[str]:
    # longer phrases first, so that "in front of" is one
    words = sorted(_meanings(), key=lambda word: (-len(word), word))
    return re.compile(r"(?<![\w-])(?:" + "|".join(map(re.escape, words)) + r")(?![\w-])", re.IGNORECASE)


@cache
def _meanings() -> dict[str, tuple[str, int]]:
    """For each word its kind and its meaning; the first kind that has it."""
    meanings: dict[str, tuple[str, int]] = {}
    for kind, group in KINDS.items():
        for number, words in enumerate(group):
            for word in words:
                meanings.setdefault(word, (kind, number))
    return meanings


def slots(caption: str) -> list[Slot]:
    """The phrases of a caption that have a kind, and stand in it once."""
    found = [
        Slot(match.start(), match.end(), word, _meanings()[word][0])
        for match in _pattern().finditer(caption)
        if (word := " ".join(match[0].casefold().split())) in _meanings()
    ]
    often = Counter(slot.word for slot in found)
    return [slot for slot in found if often[slot.word] == 1]


def planted(caption: str, slot: Slot, word: str) -> str:
    """A caption with another word in a slot, capital where the old one was."""
    said = caption[slot.start : slot.end]
    written = word.capitalize() if said[:1].isupper() else word
    return caption[: slot.start] + written + caption[slot.end :]


class Replacements:
    """By what the words of some captions are replaced, and how often.

    Two things hold over all captions: as often as one word is planted for another, that one is for it; and a word is
    planted as often as it is said truly. Without the first the rarer of two descriptions would be the wrong one,
    without the second the rarest word of a description. Where most captions say one word, it cannot be planted as often
    as it is said: the captions that say it are used less often.

    Args:
        captions: of each picture.
    """

    def __init__(self, captions: Iterable[Sequence[str]]) -> None:
        weights: dict[str, Counter[str]] = {}
        for of_picture in captions:
            for caption in of_picture:
                found = slots(caption)
                for slot in found:
                    weights.setdefault(slot.kind, Counter())[slot.word] += 1 / len(found) / len(of_picture)  # type: ignore[assignment]
        self._by_word: dict[str, tuple[list[str], np.ndarray]] = {}
        for kind_weights in weights.values():
            self._by_word |= _transitions(kind_weights)

    def of(self, word: str) -> tuple[list[str], np.ndarray]:
        """Words that may take a word's place, and how probable each is; what is left to 1 is: it stays."""
        return self._by_word.get(word, ([], np.zeros(0)))

    def slots(self, caption: str) -> list[Slot]:
        """The phrases of a caption that can be replaced."""
        return [slot for slot in slots(caption) if len(self.of(slot.word)[0])]


def _transitions(weights: "Counter[str]") -> dict[str, tuple[list[str], np.ndarray]]:
    words = sorted(weights)
    said = np.array([weights[word] for word in words], dtype=np.float64)
    said /= said.sum()
    meanings = _meanings()
    allowed = np.array(
        [
            # "an orange" shows what stood before
            [meanings[one] != meanings[other] and (one[0] in VOWELS) == (other[0] in VOWELS) for other in words]
            for one in words
        ],
        dtype=np.float64,
    )
    # symmetric scaling (Sinkhorn, Knopp 1967): flow[v, w] = flow[w, v], and every row sums to how often v is said
    scale = np.ones(len(words))
    for _ in range(SCALING_STEPS):
        reached = allowed @ scale
        scale = np.where(reached > 0, np.sqrt(scale * said / np.maximum(reached, 1e-12)), 0.0)
    flow = scale[:, None] * allowed * scale[None, :]
    probable = flow / said[:, None]
    probable /= max(1.0, float(probable.sum(axis=1).max()))
    return {
        word: ([words[i] for i in np.flatnonzero(row > 1e-9)], row[row > 1e-9])
        for word, row in zip(words, probable, strict=True)
        if (row > 1e-9).any()
    }
