"""Pairs of pictures of nearly the same scene, and the questions that only both together answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mmcompress.errors import SpecError
from mmcompress.evals.micro.questions import Asked
from mmcompress.evals.micro.render import Picture, render
from mmcompress.evals.micro.scene import (
    Scene,
    Shape,
    Style,
    alter_text,
    draw_scene,
    draw_size,
    pick,
    pick_weighted,
    place,
    sign_size,
)
from mmcompress.evals.micro.vocabulary import COLOR_NAMES, HELD_OUT_PAIRS, SHAPE_NAMES

ORDINALS = ("first", "second")

_FATES = {"stays": 0.4, "moves": 0.2, "other color": 0.2, "goes": 0.2}
_MAX_NEW_SHAPES = 2


@dataclass(frozen=True)
class Pair:
    """Two scenes with many objects in common, and their pictures (RGB, uint8 [height, width, 3])."""

    scenes: tuple[Scene, Scene]
    pictures: tuple[Picture, Picture]


def make_pair(seed: int, index: int, style: Style | None = None) -> tuple[Pair, list[Asked]]:
    """Make pair `index` of the endless series `seed` with a question of every form that it allows.

    Raises:
        SpecError: `seed` or `index` is negative.
    """
    if seed < 0 or index < 0:
        raise SpecError(f"seed and index must not be negative, got seed={seed} and index={index}.")
    pair_rng, question_rng = np.random.default_rng((seed, index)).spawn(2)
    pair = draw_pair(pair_rng, style or Style())
    asked = (asker(question_rng, pair) for asker in _ASKERS)
    return pair, [question for question in asked if question is not None]


def draw_pair(rng: np.random.Generator, style: Style) -> Pair:
    """Draw a scene and a variation of it, in random order."""
    scene = draw_scene(rng, style)
    scenes = scene, _vary(rng, scene, style)
    if rng.random() < 0.5:
        scenes = scenes[::-1]
    return Pair(scenes, (render(rng, scenes[0]), render(rng, scenes[1])))


def draw_pair_question(rng: np.random.Generator, pair: Pair) -> Asked | None:
    """Ask one question of a random form; None if `pair` does not allow that form."""
    return pick(rng, _ASKERS)(rng, pair)


def _vary(rng: np.random.Generator, scene: Scene, style: Style) -> Scene:
    shapes: list[Shape] = []
    to_place: list[tuple[str, str, int]] = []
    for shape in scene.shapes:
        match pick_weighted(rng, _FATES):
            case "stays":
                shapes.append(shape)
            case "other color":
                shapes.append(replace(shape, color=pick(rng, [name for name in COLOR_NAMES if name != shape.color])))
            case "moves":
                to_place.append((*shape.pair, shape.box.width))
    kinds = [shape.kind for shape in scene.shapes] or SHAPE_NAMES
    for _ in range(rng.integers(_MAX_NEW_SHAPES + 1)):
        to_place.append((pick(rng, COLOR_NAMES), pick(rng, kinds), draw_size(rng, style.shape_sizes, style.big)))

    canvas = scene.width, scene.height
    taken = [shape.box for shape in shapes]
    signs = []
    for sign in scene.signs:
        # Every sign moves, so that its place does not say whether its text is another one.
        text = alter_text(rng, sign.text) if rng.random() < 0.5 else sign.text
        box = place(rng, canvas, sign_size(text, sign.font, sign.font_size), taken)
        if box is not None:
            taken.append(box)
            signs.append(replace(sign, text=text, box=box))
    for color, kind, size in to_place:
        box = place(rng, canvas, (size, size), taken)
        if box is not None:
            taken.append(box)
            shapes.append(Shape(color, kind, box))
    return replace(scene, shapes=tuple(shapes), signs=tuple(signs))


def _more(rng: np.random.Generator, pair: Pair) -> Asked | None:
    first, second = (Counter(shape.kind for shape in scene.shapes) for scene in pair.scenes)
    differing = [kind for kind in sorted(first | second) if first[kind] != second[kind]]
    if not differing:
        return None
    kind = pick(rng, [kind for kind in differing if first[kind] and second[kind]] or differing)
    answer = ORDINALS[second[kind] > first[kind]]
    return Asked("compare", f"which picture has more {kind} ?", answer, "more")


def _exist(rng: np.random.Generator, pair: Pair) -> Asked | None:
    # The answer is always another one for the other picture.
    shown = [{shape.pair for shape in scene.shapes} - HELD_OUT_PAIRS for scene in pair.scenes]
    only = [sorted(shown[0] - shown[1]), sorted(shown[1] - shown[0])]
    if not all(only):
        return None
    asked, holding = int(rng.integers(2)), int(rng.integers(2))
    color, kind = pick(rng, only[holding])
    question = f"is there a {color} {kind} in the {ORDINALS[asked]} picture ?"
    return Asked("compare", question, "yes" if asked == holding else "no", "exist")


def _same(rng: np.random.Generator, pair: Pair) -> Asked | None:
    first, second = ({sign.color: sign for sign in scene.signs} for scene in pair.scenes)
    both = sorted(first.keys() & second.keys())
    if not both:
        return None
    color = pick(rng, both)
    kind = first[color].text_kind
    verb = "are" if kind == "letters" else "is"
    answer = "yes" if first[color].text == second[color].text else "no"
    return Asked("compare", f"{verb} the {kind} on the {color} sign the same in both pictures ?", answer, "same")


_ASKERS: tuple[Callable[[np.random.Generator, Pair], Asked | None], ...] = (_more, _exist, _same)
