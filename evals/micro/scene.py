"""Placing coloured shapes and number signs on the canvas, without overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from mmcompress.evals.micro.masks import FONT_SIZES, FONTS, number_mask
from mmcompress.evals.micro.vocabulary import COLOR_NAMES, SHAPE_NAMES, UNSEEN_PAIRS

CANVAS = 168
"""Side of every picture, in pixels."""

SIGN_PADDING = (3, 4)
"""Pixels between a sign's top-left corner and its number, as (top, left)."""

_MIN_GAP = 5
_ATTEMPTS = 30
_MIN_SHAPES, _MAX_SHAPES = 3, 6
_SECOND_SIGN = 0.6
_SHAPE_SIZES = (13, 15, 18, 22, 27, 33, 40)
_SHAPE_SIZE_WEIGHTS = np.array([0.20, 0.20, 0.17, 0.15, 0.12, 0.09, 0.07])
_FONT_SIZE_WEIGHTS = np.array([0.45, 0.33, 0.22])

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


@dataclass(frozen=True)
class Sign:
    """A coloured rectangle that shows a two-digit number."""

    color: str
    number: str
    font: str
    font_size: int
    box: Box


@dataclass(frozen=True)
class Scene:
    """All objects of one picture; the colours of the signs differ from each other."""

    shapes: tuple[Shape, ...]
    signs: tuple[Sign, ...]


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw a random scene of up to six shapes and one or two signs; an object that finds no room is left out."""
    taken: list[Box] = []
    signs = _draw_signs(rng, taken)
    return Scene(_draw_shapes(rng, taken), signs)


def pick(rng: np.random.Generator, options: Sequence[Item]) -> Item:
    """Draw one of `options`, all equally likely."""
    return options[int(rng.integers(len(options)))]


def _draw_signs(rng: np.random.Generator, taken: list[Box]) -> tuple[Sign, ...]:
    signs = []
    count = 2 if rng.random() < _SECOND_SIGN else 1
    for color_index in rng.permutation(len(COLOR_NAMES))[:count]:
        number = f"{rng.integers(100):02d}"
        font = pick(rng, FONTS)
        font_size = FONT_SIZES[int(rng.choice(len(FONT_SIZES), p=_FONT_SIZE_WEIGHTS))]
        height, width = number_mask(number, font, font_size).shape
        top, left = SIGN_PADDING
        box = _place(rng, width + 2 * left, height + 2 * top + 1, taken)
        if box is not None:
            signs.append(Sign(COLOR_NAMES[color_index], number, font, font_size, box))
    return tuple(signs)


def _draw_shapes(rng: np.random.Generator, taken: list[Box]) -> tuple[Shape, ...]:
    shapes = []
    # A scene uses only some kinds, so that kinds repeat and counting is worth asking.
    kinds = [SHAPE_NAMES[index] for index in rng.permutation(len(SHAPE_NAMES))[: rng.integers(3, 8)]]
    for _ in range(rng.integers(_MIN_SHAPES, _MAX_SHAPES + 1)):
        color, kind = _draw_seen_pair(rng, kinds)
        size = _SHAPE_SIZES[int(rng.choice(len(_SHAPE_SIZES), p=_SHAPE_SIZE_WEIGHTS))]
        box = _place(rng, size, size, taken)
        if box is not None:
            shapes.append(Shape(color, kind, box))
    return tuple(shapes)


def _draw_seen_pair(rng: np.random.Generator, kinds: Sequence[str]) -> tuple[str, str]:
    while True:
        pair = pick(rng, COLOR_NAMES), pick(rng, kinds)
        if pair not in UNSEEN_PAIRS:
            return pair


def _place(rng: np.random.Generator, width: int, height: int, taken: list[Box]) -> Box | None:
    for _ in range(_ATTEMPTS):
        x = int(rng.integers(1, CANVAS - width - 1))
        y = int(rng.integers(1, CANVAS - height - 1))
        box = Box(x, y, width, height)
        if all(box.is_clear_of(other, _MIN_GAP) for other in taken):
            taken.append(box)
            return box
    return None
