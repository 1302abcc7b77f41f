"""Questions have exactly one right answer, which is the given one, and no answer can be guessed."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from mmcompress.errors import SpecError
from mmcompress.evals.micro.questions import FORMS, TYPES, Asked, ask, draw_question
from mmcompress.evals.micro.scene import Box, Scene, Shape, Sign, Style, crowded, draw_scene
from mmcompress.evals.micro.vocabulary import HELD_OUT_PAIRS, SHAPE_NAMES, TOKENS

PLAIN = Style()
STYLES = (PLAIN, Style(168, 168), crowded(PLAIN), Style(336, 224, shapes=(0, 3), signs=(0, 3)))


def asked(style: Style = PLAIN, count: int = 2000) -> Iterator[tuple[Scene, Asked]]:
    """What is asked for evaluation and for training."""
    weights = dict.fromkeys(FORMS, 1.0)
    for index in range(count):
        rng = np.random.default_rng((10, index))
        scene = draw_scene(rng, style)
        drawn = [draw_question(rng, scene, weights) for _ in range(4)]
        for question in (*ask(rng, scene), *(question for question in drawn if question is not None)):
            yield scene, question


@pytest.fixture(scope="module")
def many() -> list[tuple[Scene, Asked]]:
    return list(asked())


def answers_to(scene: Scene, question: str) -> set[str]:
    """Every answer `question` could have in `scene`: one exactly if its referent is unique."""
    pairs = [shape.pair for shape in scene.shapes]
    if options := re.fullmatch(r"(.+ \?) A (\w+) B (\w+) C (\w+) D (\w+)", question):
        stem, *words = options.groups()
        assert len(set(words)) == 4
        return {"ABCD"[words.index(answer)] for answer in answers_to(scene, stem.replace("which", "what"))}
    if found := re.fullmatch(r"is there a (\w+) (\w+) \?", question):
        return {"yes" if found.groups() in pairs else "no"}
    if found := re.fullmatch(r"what color is the (\w+) \?", question):
        return {color for color, _ in occurring_once(pairs, 1, found[1])}
    if found := re.fullmatch(r"what shape is (\w+) \?", question):
        return {kind for _, kind in occurring_once(pairs, 0, found[1])}
    if found := re.fullmatch(r"how many (\w+) shapes \?", question):
        return {str([color for color, _ in pairs].count(found[1]))}
    if found := re.fullmatch(r"how many (\w+) \?", question):
        assert found[1] in SHAPE_NAMES
        return {str([kind for _, kind in pairs].count(found[1]))}
    if found := re.fullmatch(r"what (number is|letters are|word is) on the (\w+) sign \?", question):
        texts = {sign.text for sign in scene.signs if sign.color == found[2]}
        wanted = {"number is": r"\d\d", "letters are": "[A-Z]{2}", "word is": "[A-Z]{3,5}"}[found[1]]
        assert all(re.fullmatch(wanted, text) for text in texts)
        return {" ".join(text) for text in texts}
    if found := re.fullmatch(r"is the (\w+) (\w+) in the (left|right|top|bottom) half \?", question):
        across, down = center(scene, (found[1], found[2]))
        offset = across / scene.width - 0.5 if found[3] in ("left", "right") else down / scene.height - 0.5
        assert abs(offset) >= 0.1, "too close to call"
        return {"yes" if (offset > 0) == (found[3] in ("right", "bottom")) else "no"}
    if found := re.fullmatch(r"which half (left right|top bottom) is the (\w+) (\w+) in \?", question):
        across, down = center(scene, (found[2], found[3]))
        offset = across / scene.width - 0.5 if found[1] == "left right" else down / scene.height - 0.5
        assert abs(offset) >= 0.1, "too close to call"
        return {found[1].split()[offset > 0]}
    found = re.fullmatch(r"is the (\w+) (\w+) (left of|right of|above|below) the (\w+) (\w+) \?", question)
    assert found, f"unknown question: {question}"
    first, second = center(scene, (found[1], found[2])), center(scene, (found[4], found[5]))
    across, down = first[0] - second[0], first[1] - second[1]
    assert abs(across if found[3] in ("left of", "right of") else down) >= 20, "too close to call"
    holds = {"left of": across < 0, "right of": across > 0, "above": down < 0, "below": down > 0}[found[3]]
    return {"yes" if holds else "no"}


def center(scene: Scene, pair: tuple[str, str]) -> tuple[float, float]:
    (box,) = (shape.box for shape in scene.shapes if shape.pair == pair)
    return box.x + box.width / 2, box.y + box.height / 2


def occurring_once(pairs: list[tuple[str, str]], part: int, word: str) -> list[tuple[str, str]]:
    matching = [pair for pair in pairs if pair[part] == word]
    return matching if len(matching) == 1 else []


@pytest.mark.parametrize("style", STYLES)
def test_every_answer_is_right_and_the_only_one(style: Style) -> None:
    for scene, question in asked(style, 300):
        assert answers_to(scene, question.question) == {question.answer}, question


def test_every_word_is_a_token(many: list[tuple[Scene, Asked]]) -> None:
    words = {word for _, asked in many for word in f"{asked.question} {asked.answer}".split(" ")}
    assert words <= set(TOKENS)


def test_only_compose_is_about_held_out_pairs(many: list[tuple[Scene, Asked]]) -> None:
    for scene, asked in many:
        words = asked.question.split(" ")
        named = set(itertools.pairwise(words)) & HELD_OUT_PAIRS
        if asked.referent is not None and asked.referent < len(scene.shapes):
            shape = scene.shapes[asked.referent]
            named |= {shape.pair} & HELD_OUT_PAIRS
            if asked.form == "color-choice":
                named |= {(color, shape.kind) for color in words[8::2]} & HELD_OUT_PAIRS
            if asked.form == "shape-choice":
                named |= {(shape.color, kind) for kind in words[6::2]} & HELD_OUT_PAIRS
        assert len(named) == (asked.type == "compose"), asked


def test_referents_are_what_the_question_names(many: list[tuple[Scene, Asked]]) -> None:
    referring = {"color", "shape", "number", "letters", "word", "side", "half", "color-choice", "shape-choice"}
    for scene, asked in many:
        if asked.referent is None:
            assert asked.form not in referring
            continue
        thing = scene.objects[asked.referent]
        words = asked.question.split(" ")
        if isinstance(thing, Sign):
            assert (
                thing.color in words
                and " ".join(thing.text) == asked.answer
                and asked.form in ("number", "letters", "word")
            )
        else:
            assert asked.form in referring | {"exist"}
            assert {*thing.pair} <= {*words, asked.answer}
            assert asked.form != "exist" or [shape.pair for shape in scene.shapes].count(thing.pair) == 1


def balanced(answers: list[str], allowed: tuple[str, ...]) -> bool:
    """Whether all of `allowed` are about equally frequent: within four standard errors."""
    counts, share = Counter(answers), 1 / len(allowed)
    assert set(counts) == set(allowed)
    error = math.sqrt(share * (1 - share) / len(answers))
    return all(abs(counts[answer] / len(answers) - share) < 4 * error for answer in allowed)


def test_yes_and_no_and_the_options_are_equally_frequent(many: list[tuple[Scene, Asked]]) -> None:
    for kind, form in [
        ("exist", "exist"),
        ("spatial", "side"),
        ("spatial", "relation"),
        ("compose", "exist"),
        ("compose", "side"),
    ]:
        answers = [asked.answer for _, asked in many if (asked.type, asked.form) == (kind, form)]
        assert len(answers) > 200 and balanced(answers, ("yes", "no")), (kind, form)
    for form in ("color-choice", "shape-choice", "count-choice"):
        assert balanced([asked.answer for _, asked in many if asked.form == form], ("A", "B", "C", "D")), form
    for words in (
        ("left half", "right half"),
        ("top half", "bottom half"),
        ("left of", "right of"),
        ("above", "below"),
    ):
        for word in words:
            assert balanced([asked.answer for _, asked in many if f" {word} " in asked.question], ("yes", "no")), word


def test_existence_cannot_be_guessed_from_one_word(many: list[tuple[Scene, Asked]]) -> None:
    present: dict[str, list[tuple[bool, bool]]] = {"exist": [], "compose": []}
    for scene, asked in many:
        if asked.form == "exist" and asked.answer == "no":
            color, kind = asked.question.split()[3:5]
            both = {shape.color for shape in scene.shapes}, {shape.kind for shape in scene.shapes}
            present[asked.type].append((color in both[0], kind in both[1]))
    # Words drawn blindly would occur in the scene in 45 % and 40 % of the cases.
    assert (np.mean(present["exist"], axis=0) > (0.62, 0.54)).all()
    assert np.mean(present["compose"]) > 0.7 and np.mean(np.any(present["compose"], axis=1)) > 0.98


def test_every_type_is_asked_as_often_as_possible() -> None:
    counts: Counter[str] = Counter()
    for index in range(500):
        rng = np.random.default_rng((12, index))
        questions = ask(rng, draw_scene(rng, PLAIN))
        assert [asked.type for asked in questions] == sorted((asked.type for asked in questions), key=TYPES.index)
        assert len({(asked.type, asked.form) for asked in questions}) == len(questions) <= 9
        counts.update(asked.type for asked in questions)
    assert counts["exist"] >= 495 and counts["count"] == counts["read"] == 500
    assert counts["choice"] >= 490 and counts["spatial"] >= 950 and counts["attribute"] >= 850
    assert 150 < counts["compose"] < 320


def test_only_the_types_named_are_asked() -> None:
    rng = np.random.default_rng(3)
    scene = draw_scene(rng, PLAIN)
    assert {asked.type for asked in ask(rng, scene, ["read", "spatial"])} == {"read", "spatial"}


def test_forms_are_drawn_by_weight() -> None:
    rng = np.random.default_rng(3)
    scenes = [draw_scene(rng, PLAIN) for _ in range(400)]
    drawn = [draw_question(rng, scene, {"exist": 3.0, "kind-count": 1.0, "color": 0.0}) for scene in scenes]
    forms = Counter(asked.form for asked in drawn if asked is not None)
    assert set(forms) == {"exist", "kind-count"} and 0.65 < forms["exist"] / len(drawn) < 0.85
    for form in FORMS:
        assert {asked.form for scene in scenes if (asked := draw_question(rng, scene, {form: 1.0}))} == {form}
    with pytest.raises(SpecError, match="count-choice"):
        draw_question(rng, scenes[0], {"counting": 1.0})


def test_what_a_scene_does_not_allow_is_not_asked() -> None:
    rng = np.random.default_rng(0)
    empty = Scene(224, 224, (), ())
    assert {asked.question.split(" ")[0] for asked in ask(rng, empty)} == {"how"}
    twins = Scene(224, 224, tuple(Shape("blue", "star", Box(x, 20, 20, 20)) for x in range(10, 211, 25)), ())
    for _ in range(50):
        for question in ask(rng, twins):
            assert question.form in ("exist", "kind-count", "color-count", "count-choice")
            assert question.referent is None and question.answer != "9"
    (held_out,) = ask(rng, Scene(224, 224, (Shape("cyan", "star", Box(10, 10, 20, 20)),), ()), ["compose"])
    assert held_out.type == "compose" and ("cyan", "star") in HELD_OUT_PAIRS
