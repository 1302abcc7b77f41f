"""Questions about one of several pictures, which the others cannot answer: a needle among pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from mmcompress.errors import SpecError
from mmcompress.evals.micro.questions import Asked, ask
from mmcompress.evals.micro.render import Picture, render
from mmcompress.evals.micro.scene import Scene, Shape, Sign, Style, draw_scene

NUMBERS = Style(texts={"number": 1.0})
"""Signs say what the embedded models were taught to read."""


@dataclass(frozen=True)
class Needle:
    """A question and the pictures (RGB, uint8 [height, width, 3]) of one prompt, in order.

    Args:
        scene: number of the scene that the question is about; questions about one scene belong together.
        asked: the question.
        pictures: that scene at the place asked for, among others.
    """

    scene: int
    asked: Asked
    pictures: list[Picture]


def make_needles(seed: int, index: int, pictures: int = 2, place: int = 0, style: Style = NUMBERS) -> list[Needle]:
    """The questions about scene `index` of the endless series `seed`, each with pictures that cannot answer it.

    Args:
        seed: of the series.
        index: of the scene.
        pictures: how many a prompt has.
        place: which of them the question is about, from 0; the earlier, the more is read in between.
        style: what all scenes look like.

    Raises:
        SpecError: a number is negative, or there is no such place.
    """
    if min(seed, index) < 0 or not 0 <= place < pictures:
        raise SpecError(f"seed={seed}, index={index} and place={place} must not be negative, nor place {pictures}.")
    scene_rng, question_rng, other_rng = np.random.default_rng((seed, index)).spawn(3)
    scene = draw_scene(scene_rng, style)
    picture = render(scene_rng, scene)
    needles = []
    for asked in ask(question_rng, scene, ("attribute", "read")):
        if asked.form in _ANSWERS and asked.referent is not None:
            others = [_other(other_rng, style, scene.objects[asked.referent], asked.form) for _ in range(pictures - 1)]
            needles.append(Needle(index, asked, [*others[:place], picture, *others[place:]]))
    return needles


def _other(rng: np.random.Generator, style: Style, referent: Shape | Sign, form: str) -> Picture:
    while _ANSWERS[form](scene := draw_scene(rng, style), referent):
        pass
    return render(rng, scene)


def _same_kind(scene: Scene, referent: Shape | Sign) -> bool:
    return any(isinstance(referent, Shape) and shape.kind == referent.kind for shape in scene.shapes)


def _same_color(scene: Scene, referent: Shape | Sign) -> bool:
    return any(shape.color == referent.color for shape in scene.shapes)


def _same_sign(scene: Scene, referent: Shape | Sign) -> bool:
    return any(sign.color == referent.color for sign in scene.signs)


_ANSWERS: Mapping[str, Callable[[Scene, Shape | Sign], bool]] = {
    "color": _same_kind,
    "shape": _same_color,
    "number": _same_sign,
}
"""By form of question, whether another scene would answer it too."""
