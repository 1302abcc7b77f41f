"""Placing coloured shapes and signs on a canvas, without overlap."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import numpy as np

from mmcompress.errors import SpecError, unknown_name
from mmcompress.evals.micro.masks import FONTS, text_mask
from mmcompress.evals.micro.vocabulary import COLOR_NAMES, DIGITS, LETTERS, SHAPE_NAMES, WORDS

TEXT_KINDS: tuple[str, ...] = ("number", "letters", "word")
"""What a sign can say: two digits, two letters, or a word of three to five letters."""

SIGN_PADDING = (3, 4)
"""Pixels between a sign's top-left corner and its text, as (top, left)."""

MIN_GAP = 5
"""Pixels between any two objects, horizontally or vertically."""

_SIDES = range(168, 673)
_SHAPE_SIZES = range(8, 65)
_FONT_SIZES = range(8, 25)
_ATTEMPTS = 30
_DISTINCT_LETTERS = LETTERS.replace("Q", "")  # in small print it looks like an O

Item = TypeVar("Item")


class Box(NamedTuple):
    """A rectangle on the canvas, in pixels from its top-left corner."""

    x: int
    y: int
    width: int
    height: int

    @property
    def center(self) -> tuple[float, float]:
        """The middle as (x, y), in pixels."""
        return self.x + self.width / 2, self.y + self.height / 2

    def moved(self, across: int, down: int) -> Box:
        """The box so many pixels further right and down."""
        return self._replace(x=self.x + across, y=self.y + down)

    def union(self, other: Box) -> Box:
        """The smallest box that holds both."""
        x, y = min(self.x, other.x), min(self.y, other.y)
        right = max(self.x + self.width, other.x + other.width)
        bottom = max(self.y + self.height, other.y + other.height)
        return Box(x, y, right - x, bottom - y)

    def is_clear_of(self, other: Box, gap: int = 0) -> bool:
        """Whether at least `gap` pixels lie between the two boxes, horizontally or vertically."""
        return (
            self.x + self.width + gap <= other.x
            or other.x + other.width + gap <= self.x
            or self.y + self.height + gap <= other.y
            or other.y + other.height + gap <= self.y
        )


@dataclass(frozen=True)
class Shape:
    """A coloured shape that fills its square box."""

    color: str
    kind: str
    box: Box

    @property
    def pair(self) -> tuple[str, str]:
        """What names the shape: (colour, kind)."""
        return self.color, self.kind


@dataclass(frozen=True)
class Sign:
    """A coloured rectangle that shows a text."""

    color: str
    text: str
    font: str
    font_size: int
    box: Box

    @property
    def text_kind(self) -> str:
        """Which of `TEXT_KINDS` the text is."""
        if self.text.isdigit():
            return "number"
        return "letters" if len(self.text) == 2 else "word"


@dataclass(frozen=True)
class Scene:
    """All objects of one picture, in pixels; the colours of the signs differ from each other."""

    width: int
    height: int
    shapes: tuple[Shape, ...]
    signs: tuple[Sign, ...]

    @property
    def objects(self) -> tuple[Shape | Sign, ...]:
        """The shapes, then the signs."""
        return (*self.shapes, *self.signs)


@dataclass(frozen=True)
class Style:
    """What scenes look like.

    Args:
        width: of the canvas in pixels, 168 to 672.
        height: of the canvas in pixels, 168 to 672.
        shapes: the fewest and the most shapes.
        signs: the fewest and the most signs, at most 8 because their colours differ.
        big: probability that an object is drawn from its sizes with the big ones being common, not the small ones.
        texts: how often signs say each of `TEXT_KINDS`, as weights.
        shape_sizes: sides of shapes in pixels, ascending; the first is three times as common as the last.
        font_sizes: of the texts in pixels, ascending, with the same frequencies.

    Raises:
        SpecError: a value is out of range.
    """

    width: int = 224
    height: int = 224
    shapes: tuple[int, int] = (3, 6)
    signs: tuple[int, int] = (1, 2)
    big: float = 0.0
    texts: Mapping[str, float] = field(default_factory=lambda: {"number": 2.0, "letters": 1.0, "word": 1.0})
    shape_sizes: tuple[int, ...] = (13, 15, 18, 22, 27, 33, 40)
    font_sizes: tuple[int, ...] = (15, 18, 22)

    def __post_init__(self) -> None:
        _check_in("width and height", (self.width, self.height), _SIDES)
        _check_in("shape_sizes", self.shape_sizes, _SHAPE_SIZES)
        _check_in("font_sizes", self.font_sizes, _FONT_SIZES)
        if not 0 <= self.shapes[0] <= self.shapes[1]:
            raise SpecError(f"shapes must be (fewest, most) with 0 <= fewest <= most, got {self.shapes}.")
        if not 0 <= self.signs[0] <= self.signs[1] <= len(COLOR_NAMES):
            raise SpecError(f"signs must be (fewest, most) with 0 <= fewest <= most <= 8, got {self.signs}.")
        if not 0 <= self.big <= 1:
            raise SpecError(f"big is a probability, 0 to 1, got {self.big}.")
        for kind in self.texts:
            if kind not in TEXT_KINDS:
                raise unknown_name("kind of text", kind, TEXT_KINDS)
        if min(self.texts.values(), default=0) < 0 or sum(self.texts.values()) <= 0:
            raise SpecError(f"texts needs weights of at least 0, and one above it, got {dict(self.texts)}.")


def crowded(style: Style) -> Style:
    """Return `style` with as many objects as keep half of the canvas free: up to 12 shapes and 5 signs at 168 x 168."""
    area = style.width * style.height / 168**2
    signs = min(len(COLOR_NAMES), round(2 * area)), min(len(COLOR_NAMES), round(5 * area))
    return replace(style, shapes=(round(6 * area), round(12 * area)), signs=signs)


def draw_scene(rng: np.random.Generator, style: Style) -> Scene:
    """Draw a random scene; an object that finds no room is left out."""
    taken: list[Box] = []
    signs = _draw_signs(rng, style, taken)
    return Scene(style.width, style.height, _draw_shapes(rng, style, taken), signs)


def pick(rng: np.random.Generator, options: Sequence[Item]) -> Item:
    """Draw one of `options`, all equally likely."""
    return options[int(rng.integers(len(options)))]


def pick_weighted(rng: np.random.Generator, weights: Mapping[Item, float]) -> Item:
    """Draw one of the keys, each as likely as its weight says."""
    point = rng.random()
    bounds = list(itertools.accumulate(weights.values()))
    return list(weights)[bisect.bisect_right(bounds, point * bounds[-1])]


def draw_size(rng: np.random.Generator, sizes: tuple[int, ...], big: float) -> int:
    """Draw one of `sizes` (ascending), mostly a small one, or with probability `big` mostly a big one."""
    return pick_weighted(rng, _size_weights(sizes, bool(rng.random() < big)))


def draw_text(rng: np.random.Generator, kind: str) -> str:
    """Draw a text of one of `TEXT_KINDS`."""
    if kind == "word":
        return pick(rng, WORDS)
    characters = DIGITS if kind == "number" else _DISTINCT_LETTERS
    return pick(rng, characters) + pick(rng, characters)


def alter_text(rng: np.random.Generator, text: str) -> str:
    """Exchange one character of a number or of letters, or a word for another of its length."""
    if len(text) > 2:
        return pick(rng, [word for word in WORDS if len(word) == len(text) and word != text])
    place = int(rng.integers(len(text)))
    others = (DIGITS if text.isdigit() else _DISTINCT_LETTERS).replace(text[place], "")
    return text[:place] + pick(rng, others) + text[place + 1 :]


def sign_size(text: str, font: str, font_size: int) -> tuple[int, int]:
    """Return width and height of the sign that shows `text`, in pixels."""
    height, width = text_mask(text, font, font_size).shape
    top, left = SIGN_PADDING
    return width + 2 * left, height + 2 * top


def place(rng: np.random.Generator, canvas: tuple[int, int], size: tuple[int, int], taken: Sequence[Box]) -> Box | None:
    """Find a box of `size` on a canvas (width, height) clear of all `taken` ones, or None if there seems to be none."""
    for _ in range(_ATTEMPTS):
        x, y = (int(rng.integers(1, side - length)) for side, length in zip(canvas, size, strict=True))
        box = Box(x, y, *size)
        if all(box.is_clear_of(other, MIN_GAP) for other in taken):
            return box
    return None


def _draw_signs(rng: np.random.Generator, style: Style, taken: list[Box]) -> tuple[Sign, ...]:
    signs = []
    for color_index in rng.permutation(len(COLOR_NAMES))[: _between(rng, style.signs)]:
        text = draw_text(rng, pick_weighted(rng, style.texts))
        font, font_size = pick(rng, FONTS), draw_size(rng, style.font_sizes, style.big)
        box = place(rng, (style.width, style.height), sign_size(text, font, font_size), taken)
        if box is not None:
            taken.append(box)
            signs.append(Sign(COLOR_NAMES[color_index], text, font, font_size, box))
    return tuple(signs)


def _draw_shapes(rng: np.random.Generator, style: Style, taken: list[Box]) -> tuple[Shape, ...]:
    shapes = []
    # A scene uses only some kinds, so that kinds repeat and counting is worth asking.
    kinds = [SHAPE_NAMES[index] for index in rng.permutation(len(SHAPE_NAMES))[: rng.integers(3, 8)]]
    for _ in range(_between(rng, style.shapes)):
        color, kind = pick(rng, COLOR_NAMES), pick(rng, kinds)
        size = draw_size(rng, style.shape_sizes, style.big)
        box = place(rng, (style.width, style.height), (size, size), taken)
        if box is not None:
            taken.append(box)
            shapes.append(Shape(color, kind, box))
    return tuple(shapes)


def _between(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    return int(rng.integers(bounds[0], bounds[1] + 1))


@functools.cache
def _size_weights(sizes: tuple[int, ...], reverse: bool) -> dict[int, float]:
    weights = np.linspace(3, 1, len(sizes)).tolist()
    return dict(zip(sizes, weights[::-1] if reverse else weights, strict=True))


def _check_in(name: str, values: Sequence[int], allowed: range) -> None:
    if not values or any(value not in allowed for value in values):
        raise SpecError(f"{name} must be {allowed.start} to {allowed[-1]} pixels, got {values}.")
