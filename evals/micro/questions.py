"""Asking questions about a scene, in the words of the embedded model.

Only shapes are counted, compared or looked for; a sign is named only by the questions that read it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from mmcompress.evals.micro.scene import Scene, Shape, pick
from mmcompress.evals.micro.vocabulary import COLOR_NAMES, OPTION_LETTERS, SHAPE_NAMES, UNSEEN_PAIRS

QuestionType = Literal["exist", "attribute", "count", "read", "choice", "spatial"]

_ATTEMPTS = 20
_MIN_OFFSET = 20
_AXIS_AND_SIGN: dict[str, tuple[int, int]] = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}


class Asked(NamedTuple):
    """A question about one scene with its only right answer."""

    type: QuestionType
    question: str
    answer: str


def ask(rng: np.random.Generator, scene: Scene) -> list[Asked]:
    """Ask one question of every kind that `scene` answers without ambiguity, at most seven.

    `attribute` is asked twice, for a colour and for a shape; the other types once.
    """
    asked = (asker(rng, scene) for asker in _ASKERS)
    return [question for question in asked if question is not None]


def _exist(rng: np.random.Generator, scene: Scene) -> Asked | None:
    present = {(shape.color, shape.kind) for shape in scene.shapes}
    if rng.random() < 0.5:
        shape = pick(rng, scene.shapes)
        return Asked("exist", f"is there a {shape.color} {shape.kind} ?", "yes")
    for _ in range(_ATTEMPTS):
        color, kind = _plausible_pair(rng, scene.shapes)
        if (color, kind) not in present | UNSEEN_PAIRS:
            return Asked("exist", f"is there a {color} {kind} ?", "no")
    return None


def _plausible_pair(rng: np.random.Generator, shapes: tuple[Shape, ...]) -> tuple[str, str]:
    # Mostly words that the picture does contain: an absent pair must not be told from one word alone.
    color, kind = pick(rng, shapes).color, pick(rng, shapes).kind
    draw = rng.random()
    if draw < 0.4:
        return color, kind
    if draw < 0.575:
        return color, pick(rng, SHAPE_NAMES)
    if draw < 0.75:
        return pick(rng, COLOR_NAMES), kind
    return pick(rng, COLOR_NAMES), pick(rng, SHAPE_NAMES)


def _attribute_color(rng: np.random.Generator, scene: Scene) -> Asked | None:
    unique = _unique_by_kind(scene)
    if not unique:
        return None
    shape = pick(rng, unique)
    return Asked("attribute", f"what color is the {shape.kind} ?", shape.color)


def _attribute_shape(rng: np.random.Generator, scene: Scene) -> Asked | None:
    counts = Counter(shape.color for shape in scene.shapes)
    unique = [shape for shape in scene.shapes if counts[shape.color] == 1]
    if not unique:
        return None
    shape = pick(rng, unique)
    return Asked("attribute", f"what shape is {shape.color} ?", shape.kind)


def _count(rng: np.random.Generator, scene: Scene) -> Asked:
    by_kind, present = rng.random() < 0.6, rng.random() >= 0.25
    shape = pick(rng, scene.shapes)
    if by_kind:
        kind = shape.kind if present else pick(rng, SHAPE_NAMES)
        count = sum(other.kind == kind for other in scene.shapes)
        return Asked("count", f"how many {kind} ?", str(count))
    color = shape.color if present else pick(rng, COLOR_NAMES)
    count = sum(other.color == color for other in scene.shapes)
    return Asked("count", f"how many {color} shapes ?", str(count))


def _read(rng: np.random.Generator, scene: Scene) -> Asked | None:
    if not scene.signs:
        return None
    sign = pick(rng, scene.signs)
    return Asked("read", f"what number is on the {sign.color} sign ?", " ".join(sign.number))


def _choice(rng: np.random.Generator, scene: Scene) -> Asked | None:
    unique = _unique_by_kind(scene)
    if not unique:
        return None
    shape = pick(rng, unique)
    wrong = [color for color in COLOR_NAMES if color != shape.color]
    right_option = int(rng.integers(len(OPTION_LETTERS)))
    colors = [wrong[index] for index in rng.permutation(len(wrong))[: len(OPTION_LETTERS) - 1]]
    colors.insert(right_option, shape.color)
    options = " ".join(f"{letter} {color}" for letter, color in zip(OPTION_LETTERS, colors, strict=True))
    return Asked("choice", f"which color is the {shape.kind} ? {options}", OPTION_LETTERS[right_option])


def _spatial(rng: np.random.Generator, scene: Scene) -> Asked | None:
    counts = Counter((shape.color, shape.kind) for shape in scene.shapes)
    unique = [shape for shape in scene.shapes if counts[shape.color, shape.kind] == 1]
    if len(unique) < 2:
        return None
    for _ in range(_ATTEMPTS):
        first, second = (unique[index] for index in rng.permutation(len(unique))[:2])
        relation = pick(rng, tuple(_AXIS_AND_SIGN))
        axis, sign = _AXIS_AND_SIGN[relation]
        offset = sign * (first.box.center[axis] - second.box.center[axis])
        if abs(offset) >= _MIN_OFFSET:
            question = f"is the {first.color} {first.kind} {relation} the {second.color} {second.kind} ?"
            return Asked("spatial", question, "yes" if offset > 0 else "no")
    return None


def _unique_by_kind(scene: Scene) -> list[Shape]:
    counts = Counter(shape.kind for shape in scene.shapes)
    return [shape for shape in scene.shapes if counts[shape.kind] == 1]


_ASKERS: tuple[Callable[[np.random.Generator, Scene], Asked | None], ...] = (
    _exist,
    _attribute_color,
    _attribute_shape,
    _count,
    _read,
    _choice,
    _spatial,
)
