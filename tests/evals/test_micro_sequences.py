"""Pairs of pictures and clips: frames obey the scene's rules, and every answer needs what it should need."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest

from mmcompress.errors import SpecError
from mmcompress.evals.micro.clips import Clip, draw_clip, draw_clip_question, make_clip
from mmcompress.evals.micro.compare import Pair, draw_pair, draw_pair_question, make_pair
from mmcompress.evals.micro.scene import Scene, Style
from mmcompress.evals.micro.vocabulary import HELD_OUT_PAIRS, TOKENS

STYLE = Style(168, 168)


@pytest.fixture(scope="module")
def pairs() -> list[tuple[Pair, list]]:
    return [make_pair(1, index, STYLE) for index in range(400)]


@pytest.fixture(scope="module")
def clips() -> list[tuple[Clip, list]]:
    return [make_clip(1, index, STYLE, frames=4 + index % 5) for index in range(300)]


def assert_rules(scene: Scene, gap: int = 5) -> None:
    for number, thing in enumerate(scene.objects):
        x, y, width, height = thing.box
        assert min(x, y) >= 1 and x + width < scene.width and y + height < scene.height
        assert all(thing.box.is_clear_of(other.box, gap) for other in scene.objects[:number])
    assert len({sign.color for sign in scene.signs}) == len(scene.signs)


def assert_near(count: int, total: int, share: float) -> None:
    assert abs(count / total - share) < 4 * math.sqrt(share * (1 - share) / total), (count, total)


def test_equal_arguments_give_equal_pairs_and_clips() -> None:
    for make in (make_pair, make_clip):
        (first, asked), (again, asked_again), (other, _) = make(2, 3), make(2, 3), make(2, 4)
        assert first.scenes == again.scenes != other.scenes and asked == asked_again
        assert all(map(np.array_equal, first.pictures, again.pictures))


def test_bad_arguments_are_refused() -> None:
    for make in (make_pair, make_clip):
        with pytest.raises(SpecError, match="index"):
            make(0, -1)
    for frames in (3, 9):
        with pytest.raises(SpecError, match="4 to 8"):
            make_clip(0, 0, frames=frames)


def test_every_word_is_a_token_and_no_held_out_pair_is_named(pairs, clips) -> None:
    for _, questions in (*pairs, *clips):
        for asked in questions:
            words = f"{asked.question} {asked.answer}".split(" ")
            assert set(words) <= set(TOKENS)
            assert not HELD_OUT_PAIRS & set(itertools.pairwise(words))


def test_two_pictures_have_much_in_common_and_something_not(pairs) -> None:
    shared = []
    for pair, _ in pairs:
        first, second = pair.scenes
        assert_rules(first)
        assert_rules(second)
        assert all(picture.shape == (168, 168, 3) for picture in pair.pictures)
        assert first != second
        shared.append(len(set(first.shapes) & set(second.shapes)) / max(1, len(first.shapes)))
    assert 0.25 < np.mean(shared) < 0.55


def test_the_answers_about_two_pictures_are_right(pairs) -> None:
    for pair, questions in pairs:
        for asked in questions:
            first, second = pair.scenes
            if found := re.fullmatch(r"which picture has more (\w+) \?", asked.question):
                counts = [[shape.kind for shape in scene.shapes].count(found[1]) for scene in pair.scenes]
                assert counts[0] != counts[1] and asked.answer == ("first" if counts[0] > counts[1] else "second")
            elif found := re.fullmatch(r"is there a (\w+) (\w+) in the (first|second) picture \?", asked.question):
                shown = [(found[1], found[2]) in {shape.pair for shape in scene.shapes} for scene in pair.scenes]
                assert shown[0] != shown[1]
                assert asked.answer == ("yes" if shown[found[3] == "second"] else "no")
            else:
                pattern = r"(is|are) the (number|letters|word) on the (\w+) sign the same in both pictures \?"
                found = re.fullmatch(pattern, asked.question)
                assert found and (found[1] == "are") == (found[2] == "letters")
                texts = [{sign.color: sign for sign in scene.signs}[found[3]].text for scene in (first, second)]
                assert asked.answer == ("yes" if texts[0] == texts[1] else "no")


def test_the_answers_about_two_pictures_are_balanced(pairs) -> None:
    answers: dict[str, Counter[str]] = {}
    for _, questions in pairs:
        for asked in questions:
            answers.setdefault(asked.form, Counter())[asked.answer] += 1
    assert set(answers) == {"more", "exist", "same"}
    for form, counts in answers.items():
        assert set(counts) == ({"first", "second"} if form == "more" else {"yes", "no"})
        assert_near(max(counts.values()), counts.total(), 0.5)
        assert counts.total() > 0.5 * len(pairs)


def test_objects_of_a_clip_move_straight_and_stay_apart(clips) -> None:
    for clip, _ in clips:
        assert clip.pictures.shape == (len(clip.scenes), 168, 168, 3) and len(clip.scenes) in range(4, 9)
        for scene in clip.scenes:
            assert_rules(scene)
            assert len({shape.pair for shape in scene.shapes}) == len(scene.shapes)
        for pair in {shape.pair for scene in clip.scenes for shape in scene.shapes}:
            seen = {
                frame: shape.box
                for frame, scene in enumerate(clip.scenes)
                for shape in scene.shapes
                if shape.pair == pair
            }
            frames = list(seen)
            assert frames == list(range(frames[0], frames[-1] + 1))
            assert frames[0] == 0 or frames[-1] == len(clip.scenes) - 1
            line = np.linspace(seen[frames[0]].center, seen[frames[-1]].center, len(frames))
            assert np.abs(line - [seen[frame].center for frame in frames]).max() <= 2


def test_the_answers_about_clips_are_right(clips) -> None:
    for clip, questions in clips:
        first, last = clip.scenes[0], clip.scenes[-1]
        shapes = [{shape.pair: shape.box for shape in scene.shapes} for scene in (first, last)]
        for asked in questions:
            if found := re.fullmatch(r"which way does the (\w+) (\w+) move \?", asked.question):
                before, after = (boxes[found[1], found[2]] for boxes in shapes)
                across, down = after.x - before.x, after.y - before.y
                assert max(abs(across), abs(down)) >= 32 and min(abs(across), abs(down)) <= 20
                horizontal, vertical = ("left", "right")[across > 0], ("up", "down")[down > 0]
                assert asked.answer == (horizontal if abs(across) > abs(down) else vertical)
            elif found := re.fullmatch(r"did a (\w+) (appear|disappear) \?", asked.question):
                without, having = shapes if found[2] == "appear" else shapes[::-1]
                happened = any(kind == found[1] for _, kind in having.keys() - without.keys())
                assert asked.answer == ("yes" if happened else "no")
            elif asked.question == "how many shapes appear ?":
                assert asked.answer == str(len(shapes[1].keys() - shapes[0].keys()))
            else:
                pattern = r"what (number was|letters were|word was) on the (\w+) sign (first|last) \?"
                found = re.fullmatch(pattern, asked.question)
                assert found
                scene = first if found[3] == "first" else last
                (sign,) = (sign for sign in scene.signs if sign.color == found[2])
                assert " ".join(sign.text) == asked.answer and sign.text_kind == found[1].split(" ")[0]


def test_the_answers_about_clips_are_balanced(clips) -> None:
    answers: dict[str, Counter[str]] = {}
    for _, questions in clips:
        for asked in questions:
            answers.setdefault(asked.form, Counter())[asked.answer] += 1
    assert set(answers) == {"motion", "appear", "disappear", "appear-count", "first-text", "last-text"}
    for form in ("appear", "disappear"):
        assert_near(answers[form]["yes"], answers[form].total(), 0.5)
    for direction in ("left", "right", "up", "down"):
        assert_near(answers["motion"][direction], answers["motion"].total(), 0.25)
    assert answers["motion"].total() > 0.6 * len(clips)
    assert max(answers["appear-count"].values()) < 0.55 * len(clips)


def test_signs_of_clips_change_and_backgrounds_rest_or_pan(clips) -> None:
    changed = same = resting = 0
    for clip, _ in clips:
        texts = [{sign.color: sign.text for sign in scene.signs} for scene in (clip.scenes[0], clip.scenes[-1])]
        assert texts[0].keys() == texts[1].keys()
        changed += sum(texts[0][color] != texts[1][color] for color in texts[0])
        same += sum(texts[0][color] == texts[1][color] for color in texts[0])
        boxes = [{sign.color: sign.box[:2] for sign in scene.signs} for scene in (clip.scenes[0], clip.scenes[-1])]
        resting += boxes[0] == boxes[1]
    assert 0.45 < changed / (changed + same) < 0.7
    assert 0.7 < resting / len(clips) < 0.9


def test_frames_of_a_resting_clip_differ_only_where_objects_are() -> None:
    seen = 0
    for index in range(12):
        clip, _ = make_clip(4, index, STYLE)
        if clip.scenes[0].signs[:1] and clip.scenes[0].signs[0].box[:2] != clip.scenes[-1].signs[0].box[:2]:
            continue  # pans
        free = np.ones((168, 168), bool)
        for thing in (thing for scene in clip.scenes for thing in scene.objects):
            x, y, width, height = thing.box
            free[y : y + height, x : x + width] = False
        difference = np.abs(clip.pictures[0].astype(int) - clip.pictures[-1])[free]
        seen += difference.max() == 0  # else there is noise
        assert difference.mean() < 12
    assert seen >= 3


def test_questions_are_drawn_for_training() -> None:
    rng = np.random.default_rng(0)
    pair, clip = draw_pair(rng, STYLE), draw_clip(rng, STYLE, 4)
    forms = {asked.form for _ in range(60) if (asked := draw_pair_question(rng, pair))}
    assert forms <= {"more", "exist", "same"} and len(forms) >= 2
    forms = {asked.form for _ in range(60) if (asked := draw_clip_question(rng, clip))}
    assert {"appear-count", "first-text", "last-text"} <= forms
