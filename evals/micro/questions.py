"""Asking questions about a scene, in the words of the embedded models.

Only shapes are counted, compared or looked for; a sign is named only by the questions that read it. No question but
those of type `compose` is about a held-out pair of colour and shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple, get_args

import numpy as np

from mmcompress.errors import unknown_name
from mmcompress.evals.micro.scene import TEXT_KINDS, Scene, pick, pick_weighted
from mmcompress.evals.micro.vocabulary import COLOR_NAMES, HELD_OUT_PAIRS, OPTION_LETTERS, SHAPE_NAMES

QuestionType = Literal["exist", "attribute", "count", "read", "choice", "spatial", "compose"]

TYPES: tuple[QuestionType, ...] = get_args(QuestionType)

MAX_COUNT = 6
"""The largest number that is asked for."""

_ATTEMPTS = 20
_MIN_OFFSET = 20  # pixels between the middles of two shapes that are compared
_MIN_DISTANCE_FROM_MIDDLE = 0.1  # of the canvas side
_HALVES = (("left", "right"), ("top", "bottom"))
_RELATIONS = (("left of", "right of"), ("above", "below"))


class Asked(NamedTuple):
    """A question with its only right answer.

    Args:
        type: one of `TYPES`, or the kind of input where that is no single picture.
        question: words separated by single spaces.
        answer: likewise.
        form: the template, one of `FORMS` for a single picture.
        referent: index into `scene.objects` of the one object the question is about, None if there is no such one.
    """

    type: str
    question: str
    answer: str
    form: str
    referent: int | None = None


def ask(rng: np.random.Generator, scene: Scene, types: Iterable[QuestionType] = TYPES) -> list[Asked]:
    """Ask what `scene` answers without ambiguity: at most one question per type, two of `attribute` and `spatial`."""
    asked = []
    plain, held_out = _Facts(scene), _Facts(scene, held_out=True)
    for kind in types:
        facts = held_out if kind == "compose" else plain
        for forms in _SUITES[kind]:
            for index in rng.permutation(len(forms)):
                question = _ASKERS[forms[index]](rng, facts)
                if question is not None:
                    asked.append(question._replace(type=kind))
                    break
    return asked


def draw_question(rng: np.random.Generator, scene: Scene, weights: Mapping[str, float]) -> Asked | None:
    """Ask one question of a form drawn by weight, never of type `compose`; None if `scene` does not allow that form.

    Raises:
        SpecError: a key of `weights` is none of `FORMS`.
    """
    form = pick_weighted(rng, weights)
    if form not in _ASKERS:
        raise unknown_name("form of question", form, FORMS)
    return _ASKERS[form](rng, _Facts(scene))


class _Facts:
    """What is asked of a scene again and again; `askable` are the shapes that questions may be about."""

    def __init__(self, scene: Scene, held_out: bool = False) -> None:
        self.scene = scene
        self.held_out = held_out
        self.colors = Counter(shape.color for shape in scene.shapes)
        self.kinds = Counter(shape.kind for shape in scene.shapes)
        self.pairs = Counter(shape.pair for shape in scene.shapes)
        self.askable = [i for i, shape in enumerate(scene.shapes) if (shape.pair in HELD_OUT_PAIRS) == held_out]

    def unique_pairs(self) -> list[int]:
        """The askable shapes that colour and kind tell from all others."""
        return [index for index in self.askable if self.pairs[self.scene.shapes[index].pair] == 1]


def _exist(rng: np.random.Generator, facts: _Facts) -> Asked | None:
    if not facts.askable:
        return None
    if rng.random() < 0.5:
        index = pick(rng, facts.askable)
        pair = facts.scene.shapes[index].pair
        referent = index if facts.pairs[pair] == 1 else None
    else:
        absent = _absent_held_out_pair(rng, facts) if facts.held_out else _absent_pair(rng, facts)
        if absent is None:
            return None
        pair, referent = absent, None
    answer = "yes" if pair in facts.pairs else "no"
    return Asked("exist", f"is there a {pair[0]} {pair[1]} ?", answer, "exist", referent)


def _absent_pair(rng: np.random.Generator, facts: _Facts) -> tuple[str, str] | None:
    # Mostly words that the picture does contain: an absent pair must not be told from one word alone.
    for _ in range(_ATTEMPTS):
        color, kind = pick(rng, facts.scene.shapes).color, pick(rng, facts.scene.shapes).kind
        draw = rng.random()
        if draw >= 0.75:
            color, kind = pick(rng, COLOR_NAMES), pick(rng, SHAPE_NAMES)
        elif draw >= 0.575:
            color = pick(rng, COLOR_NAMES)
        elif draw >= 0.4:
            kind = pick(rng, SHAPE_NAMES)
        if (color, kind) not in facts.pairs and (color, kind) not in HELD_OUT_PAIRS:
            return color, kind
    return None


def _absent_held_out_pair(rng: np.random.Generator, facts: _Facts) -> tuple[str, str] | None:
    by_words_present: dict[int, list[tuple[str, str]]] = {}
    for color, kind in sorted(HELD_OUT_PAIRS - set(facts.pairs)):
        present = (color in facts.colors) + (kind in facts.kinds)
        by_words_present.setdefault(present, []).append((color, kind))
    return pick(rng, by_words_present[max(by_words_present)]) if by_words_present else None


def _color(rng: np.random.Generator, facts: _Facts) -> Asked | None:
    shapes = facts.scene.shapes
    unique = [index for index in facts.askable if facts.kinds[shapes[index].kind] == 1]
    if not unique:
        return None
    index = pick(rng, unique)
    return Asked("attribute", f"what color is the {shapes[index].kind} ?", shapes[index].color, "color", index)


def _shape(rng: np.random.Generator, facts: _Facts) -> Asked | None:
    shapes = facts.scene.shapes
    unique = [index for index in facts.askable if facts.colors[shapes[index].color] == 1]
    if not unique:
        return None
    index = pick(rng, unique)
    return Asked("attribute", f"what shape is {shapes[index].color} ?", shapes[index].kind, "shape", index)


def _kind_count(rng: np.random.Generator, facts: _Facts) -> Asked | None:
    return _count(rng, facts.kinds, SHAPE_NAMES, "how many {} ?", "kind-count")


def _color_count(rng: np.random.Generator, facts: _Facts) -> Asked | None:
    return _count(rng, facts.colors, COLOR_NAMES, "how many {} shapes ?", "color-count")


def _count(
    rng: np.random.Generator, counts: Counter[str], names: Sequence[str], question: str, form: str
) -> Asked | None:
    present = tuple(counts.elements())
    name = pick(rng, present) if present and rng.random() < 0.75 else pick(rng, names)
    if counts[name] > MAX_COUNT:
        return None
    return Asked("count", question.format(name), str(counts[name]), form)


def _read(rng: np.random.Generator, facts: _Facts, kind: str) -> Asked | None:
    signs = [(index, sign) for index, sign in enumerate(facts.scene.signs) if sign.text_kind == kind]
    if not signs:
        return None
    index, sign = pick(rng, signs)
    verb = "are" if kind == "letters" else "is"
    question = f"what {kind} {verb} on the {sign.color} sign ?"
    return Asked("read", question, " ".join(sign.text), kind, len(facts.scene.shapes) + index)


def _color_choice(rng: np.random.Generator, facts: _Facts) -> Asked | None:
    asked = _color(rng, facts)
    if asked is None or asked.referent is None:
        return None
    kind = facts.scene.shapes[asked.referent].kind
    answers = [color for color in COLOR_NAMES if (color, kind) not in HELD_OUT_PAIRS]
    return _choice(rng, asked, answers, "color-choice")


def _shape_choice(rng: np.random.Generator, facts: _Facts) -> Asked | None:
    asked = _shape(rng, facts)
    if asked is None or asked.referent is None:
        return None
    color = facts.scene.shapes[asked.referent].color
    answers = [kind for kind in SHAPE_NAMES if (color, kind) not in HELD_OUT_PAIRS]
    return _choice(rng, asked, answers, "shape-choice")


def _count_choice(rng: np.random.Generator, facts: _Facts) -> Asked | None:
    asked = _kind_count(rng, facts) if rng.random() < 0.5 else _color_count(rng, facts)
    if asked is None:
        return None
    return _choice(rng, asked, [str(count) for count in range(MAX_COUNT + 1)], "count-choice")


def _choice(rng: np.random.Generator, asked: Asked, answers: Sequence[str], form: str) -> Asked:
    wrong = [answer for answer in answers if answer != asked.answer]
    right = int(rng.integers(len(OPTION_LETTERS)))
    options = [wrong[index] for index in rng.permutation(len(wrong))[: len(OPTION_LETTERS) - 1]]
    options.insert(right, asked.answer)
    listing = " ".join(f"{letter} {option}" for letter, option in zip(OPTION_LETTERS, options, strict=True))
    question = f"{asked.question.replace('what', 'which')} {listing}"
    return Asked("choice", question, OPTION_LETTERS[right], form, asked.referent)


def _side(rng: np.random.Generator, facts: _Facts) -> Asked | None:
    seen = _off_middle(rng, facts)
    if seen is None:
        return None
    index, words, second = seen
    said, answer = _claim(rng, words, second)
    color, kind = facts.scene.shapes[index].pair
    return Asked("spatial", f"is the {color} {kind} in the {said} half ?", answer, "side", index)


def _half(rng: np.random.Generator, facts: _Facts) -> Asked | None:
    seen = _off_middle(rng, facts)
    if seen is None:
        return None
    index, words, second = seen
    color, kind = facts.scene.shapes[index].pair
    return Asked(
        "spatial", f"which half {words[0]} {words[1]} is the {color} {kind} in ?", words[second], "half", index
    )


def _off_middle(rng: np.random.Generator, facts: _Facts) -> tuple[int, tuple[str, str], bool] | None:
    """A shape clearly in one half of the picture: its index, the names of the halves, whether it is in the second."""
    canvas = facts.scene.width, facts.scene.height
    clear = []
    for index in facts.unique_pairs():
        center = facts.scene.shapes[index].box.center
        for axis in (0, 1):
            offset = center[axis] - canvas[axis] / 2
            if abs(offset) >= _MIN_DISTANCE_FROM_MIDDLE * canvas[axis]:
                clear.append((index, _HALVES[axis], offset > 0))
    return pick(rng, clear) if clear else None


def _relation(rng: np.random.Generator, facts: _Facts) -> Asked | None:
    unique = facts.unique_pairs()
    if len(unique) < 2:
        return None
    for _ in range(_ATTEMPTS):
        first, second = (facts.scene.shapes[unique[index]] for index in rng.permutation(len(unique))[:2])
        axis = int(rng.integers(2))
        offset = first.box.center[axis] - second.box.center[axis]
        if abs(offset) >= _MIN_OFFSET:
            said, answer = _claim(rng, _RELATIONS[axis], offset > 0)
            question = f"is the {first.color} {first.kind} {said} the {second.color} {second.kind} ?"
            return Asked("spatial", question, answer, "relation")
    return None


def _claim(rng: np.random.Generator, words: tuple[str, str], second: bool) -> tuple[str, str]:
    """Choose one of two contrary words, the second of which is true or not: the word and "yes" or "no"."""
    said = bool(rng.random() < 0.5)
    return words[said], "yes" if said == second else "no"


_ASKERS: dict[str, Callable[[np.random.Generator, _Facts], Asked | None]] = {
    "exist": _exist,
    "color": _color,
    "shape": _shape,
    "kind-count": _kind_count,
    "color-count": _color_count,
    **{kind: partial(_read, kind=kind) for kind in TEXT_KINDS},
    "color-choice": _color_choice,
    "shape-choice": _shape_choice,
    "count-choice": _count_choice,
    "side": _side,
    "half": _half,
    "relation": _relation,
}

FORMS: tuple[str, ...] = tuple(_ASKERS)
"""The templates of questions, finer than types; `half` only teaches where things are, no suite asks it."""

# Every group asks one question, of the first of its forms, in random order, that the scene allows.
_SUITES: dict[QuestionType, tuple[tuple[str, ...], ...]] = {
    "exist": (("exist",),),
    "attribute": (("color",), ("shape",)),
    "count": (("kind-count", "color-count"),),
    "read": (TEXT_KINDS,),
    "choice": (("color-choice", "shape-choice", "count-choice"),),
    "spatial": (("side",), ("relation",)),
    "compose": (("exist", "color", "shape", "side"),),
}
