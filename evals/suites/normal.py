"""How the official VQA evaluation writes answers before it compares them, so that "The two dogs." is "2 dogs"."""

from __future__ import annotations

import re
from itertools import chain

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}

# The contractions the official evaluation knows; "shed", "wed" and "whore" are left alone.
_CONTRACTED = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could I might must not she'd should they they'd we what where who who'd would you you'd",
    "'d": "he how it someone something there they where who you",
    "'d've": "he I it she somebody someone something there they we who you",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "'m": "I",
}
_OTHER = "I've ma'am o'clock 'ow's'at 'twas y'all y'all'll y'all'd've"


def _variants(word: str) -> list[str]:
    """`word` with one of its apostrophes left out."""
    return [word[:at] + word[at + 1 :] for at, letter in enumerate(word) if letter == "'"]


_WHOLE = [f"{stem}{ending}" for ending, stems in _CONTRACTED.items() for stem in stems.split()] + _OTHER.split()
_APOSTROPHES = dict(chain.from_iterable(((variant, word) for variant in _variants(word)) for word in _WHOLE))


def vqa(text: str) -> str:
    """`text` in the form VQAv2 compares."""
    return _words(_without_marks(" ".join(text.replace("\t", "\n").split("\n")).strip()))


def evalai(text: str) -> str:
    """`text` in the form TextVQA and VizWiz compare: the same, but commas and question marks go first."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return vqa(text)


def _without_marks(text: str) -> str:
    """Marks beside a blank go, others become a blank; all go if digits are grouped by a comma anywhere."""
    grouped = _DIGIT_COMMA.search(text) is not None
    written = text
    for mark in _MARKS:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        written = written.replace(mark, "" if beside_blank or grouped else " ")
    return _PERIOD.sub("", written)


def _words(text: str) -> str:
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)
