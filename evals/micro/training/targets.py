"""What every patch of a picture, and the picture as a whole, is to say when a vision encoder is trained."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmcompress.evals.micro.masks import character_centers
from mmcompress.evals.micro.scene import SIGN_PADDING, Box, Scene, Shape, Sign
from mmcompress.evals.micro.vocabulary import COLOR_NAMES, DIGITS, LETTERS, SHAPE_NAMES

SLOTS = 5
"""The longest text on a sign, in characters."""

CHARACTERS: tuple[str, ...] = (*DIGITS, *LETTERS)
BLANK = len(CHARACTERS)
"""The class of a slot behind the end of a text."""

KINDS = 2 + len(SHAPE_NAMES)
BACKGROUND, SIGN = 0, KINDS - 1
"""Classes of a patch: background, the shapes in order, sign."""

BINS = 12
"""Columns, and rows, into which a picture is divided to say where an object's centre is."""

IGNORE = -100

_PAIRS = len(COLOR_NAMES) * len(SHAPE_NAMES)
SUMMARY = _PAIRS + len(COLOR_NAMES)
"""Facts about a whole picture: pairs of colour and shape, colours of signs."""

# kind, colour, the sign's characters, column and row of the object's centre, the character nearest to the patch
FIELDS: tuple[int, ...] = (KINDS, len(COLOR_NAMES), *[BLANK + 1] * SLOTS, BINS, BINS, len(CHARACTERS))
"""Number of classes of every label of a patch."""

TEXT = slice(2, 2 + SLOTS)
PLACE = slice(2 + SLOTS, 4 + SLOTS)
GLYPH = 4 + SLOTS
"""The fields of a text, of a place, and of the nearest character."""

_MIN_SHARE = 0.25


class Targets(NamedTuple):
    """Labels of one picture.

    Args:
        patches: class per field and patch, `IGNORE` where a field says nothing [fields, rows, columns].
        owners: index of the object a patch shows, shapes before signs, -1 for none [rows, columns].
        summary: 1 for every fact that holds [SUMMARY].
    """

    patches: NDArray[np.int64]
    owners: NDArray[np.int64]
    summary: NDArray[np.float32]


def targets(scene: Scene, patch: int) -> Targets:
    """Label the patches of `scene`, `patch` px wide; one shows what covers a quarter of it or has its centre there."""
    rows, columns = scene.height // patch, scene.width // patch
    labels = np.full((len(FIELDS), rows, columns), IGNORE, np.int64)
    labels[0] = BACKGROUND
    owners = np.full((rows, columns), -1, np.int64)
    covered = np.zeros((rows, columns))
    for number, thing in enumerate(scene.objects):
        label = _label(thing, scene)
        for row, column, area in _patches(thing.box, patch, rows, columns):
            if area > covered[row, column]:
                covered[row, column] = area
                owners[row, column] = number
                labels[:-1, row, column] = label
                if isinstance(thing, Sign):
                    labels[-1, row, column] = _nearest_character(thing, (column + 0.5) * patch)
    return Targets(labels, owners, _summary(scene))


def _label(thing: Shape | Sign, scene: Scene) -> list[int]:
    x, y = thing.box.center
    place = [int(BINS * x / scene.width), int(BINS * y / scene.height)]
    color = COLOR_NAMES.index(thing.color)
    if isinstance(thing, Sign):
        text = [CHARACTERS.index(character) for character in thing.text]
        return [SIGN, color, *text, *[BLANK] * (SLOTS - len(text)), *place]
    kind = 1 + SHAPE_NAMES.index(thing.kind)
    return [kind, color, *[IGNORE] * SLOTS, *place]


def _nearest_character(sign: Sign, x: float) -> int:
    start = sign.box.x + SIGN_PADDING[1]
    centers = character_centers(sign.text, sign.font, sign.font_size)
    nearest = min(range(len(centers)), key=lambda place: abs(start + centers[place] - x))
    return CHARACTERS.index(sign.text[nearest])


def _patches(box: Box, patch: int, rows: int, columns: int) -> list[tuple[int, int, int]]:
    center = box.x + box.width // 2, box.y + box.height // 2
    found = []
    for row in range(box.y // patch, min(rows, (box.y + box.height - 1) // patch + 1)):
        height = min(box.y + box.height, (row + 1) * patch) - max(box.y, row * patch)
        for column in range(box.x // patch, min(columns, (box.x + box.width - 1) // patch + 1)):
            area = height * (min(box.x + box.width, (column + 1) * patch) - max(box.x, column * patch))
            if area >= _MIN_SHARE * patch**2 or (column, row) == (center[0] // patch, center[1] // patch):
                found.append((row, column, area))
    return found


def _summary(scene: Scene) -> NDArray[np.float32]:
    facts = np.zeros(SUMMARY, np.float32)
    for shape in scene.shapes:
        facts[COLOR_NAMES.index(shape.color) * len(SHAPE_NAMES) + SHAPE_NAMES.index(shape.kind)] = 1
    for sign in scene.signs:
        facts[_PAIRS + COLOR_NAMES.index(sign.color)] = 1
    return facts
