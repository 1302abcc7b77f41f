"""Scenes keep their rules on every canvas, and pictures show what scenes say."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from mmcompress.errors import SpecError
from mmcompress.evals.micro.build import make_sample
from mmcompress.evals.micro.masks import FONTS, shape_mask, text_mask
from mmcompress.evals.micro.render import add_noise, draw_noise, render
from mmcompress.evals.micro.scene import (
    MIN_GAP,
    Box,
    Scene,
    Shape,
    Sign,
    Style,
    alter_text,
    crowded,
    draw_scene,
    sign_size,
)
from mmcompress.evals.micro.vocabulary import COLORS, DIGITS, HELD_OUT_PAIRS, LETTERS, SHAPE_NAMES, TOKENS, WORDS

CANVASES = [(168, 168), (224, 224), (336, 224), (168, 672), (672, 672)]


def scenes(style: Style, count: int) -> list[Scene]:
    return [draw_scene(np.random.default_rng((11, index)), style) for index in range(count)]


def test_equal_arguments_give_equal_samples_and_other_arguments_give_others() -> None:
    first, again = make_sample(3, 5), make_sample(3, 5)
    assert first.scene == again.scene and first.questions == again.questions
    assert np.array_equal(first.picture, again.picture)
    for other in (make_sample(3, 6), make_sample(4, 5), make_sample(3, 5, Style(big=1.0))):
        assert other.scene != first.scene
        assert not np.array_equal(other.picture, first.picture)


@pytest.mark.parametrize("size", CANVASES)
@pytest.mark.parametrize("vary", [lambda style: style, crowded])
def test_objects_stay_on_the_canvas_and_apart(size, vary) -> None:
    style = vary(Style(*size))
    for scene in scenes(style, 15):
        assert (scene.width, scene.height) == size
        for number, thing in enumerate(scene.objects):
            x, y, width, height = thing.box
            assert min(x, y) >= 1 and x + width < scene.width and y + height < scene.height
            for other in scene.objects[:number]:
                across = max(x - other.box.x - other.box.width, other.box.x - x - width)
                down = max(y - other.box.y - other.box.height, other.box.y - y - height)
                assert max(across, down) >= MIN_GAP
        assert len(scene.shapes) <= style.shapes[1] and len(scene.signs) <= style.signs[1]
        assert len({sign.color for sign in scene.signs}) == len(scene.signs)
        for sign in scene.signs:
            assert sign.box[2:] == sign_size(sign.text, sign.font, sign.font_size)


def test_canvases_hold_what_the_style_asks_for() -> None:
    plain, many = scenes(Style(), 300), scenes(crowded(Style()), 100)
    assert {len(scene.shapes) for scene in plain} == {3, 4, 5, 6}
    assert {len(scene.signs) for scene in plain} == {1, 2}
    assert np.mean([len(scene.shapes) for scene in many]) > 14 and max(len(scene.shapes) for scene in many) >= 19
    assert np.mean([len(scene.signs) for scene in many]) > 5
    small = crowded(Style(168, 168))
    assert small.shapes[1] == 12 and small.signs == (2, 5)
    kinds = [sign.text_kind for scene in plain for sign in scene.signs]
    assert kinds.count("number") > 1.5 * kinds.count("word") > 1.5 * 0.7 * kinds.count("letters")
    words = scenes(Style(texts={"word": 1.0}, font_sizes=(10, 12)), 20)
    assert {sign.text_kind for scene in words for sign in scene.signs} == {"word"}
    assert {sign.font_size for scene in words for sign in scene.signs} == {10, 12}


def test_pictures_show_every_pair_the_held_out_ones_too() -> None:
    shown = [shape.pair for scene in scenes(Style(), 2000) for shape in scene.shapes]
    share = sum(pair in HELD_OUT_PAIRS for pair in shown) / len(shown)
    assert len(HELD_OUT_PAIRS) == 8 and share == pytest.approx(1 / 8, abs=0.02)
    assert len(set(shown)) == 64


def test_most_objects_are_small_or_mostly_big() -> None:
    def mean(big: float) -> float:
        return float(np.mean([shape.box.width for scene in scenes(Style(big=big), 300) for shape in scene.shapes]))

    assert mean(0.0) < 22.5 < mean(0.5) < 25.5 < mean(1.0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"width": 167}, "168 to 672"),
        ({"height": 673}, "168 to 672"),
        ({"shapes": (4, 3)}, "fewest"),
        ({"shapes": (-1, 3)}, "fewest"),
        ({"signs": (1, 9)}, "<= 8"),
        ({"big": 1.5}, "probability"),
        ({"texts": {"numbers": 1.0}}, "number"),
        ({"texts": {"number": 0.0}}, "weights"),
        ({"texts": {}}, "weights"),
        ({"shape_sizes": (4,)}, "shape_sizes"),
        ({"font_sizes": ()}, "font_sizes"),
    ],
)
def test_impossible_styles_are_refused(arguments, match) -> None:
    with pytest.raises(SpecError, match=match):
        Style(**arguments)


def test_the_largest_objects_fit_on_the_smallest_canvas() -> None:
    style = Style(168, 168, shape_sizes=(64,), font_sizes=(24,), texts={"word": 1.0})
    assert max(sign_size(word, font, 24)[0] for word in WORDS for font in FONTS) < 166
    assert all(scene.objects for scene in scenes(style, 50))


@pytest.mark.parametrize("kind", SHAPE_NAMES)
@pytest.mark.parametrize("color", COLORS)
def test_a_shape_is_painted_in_its_color_and_nowhere_else(color: str, kind: str) -> None:
    def paint(name: str) -> np.ndarray:
        scene = Scene(168, 168, (Shape(name, kind, Box(60, 50, 40, 40)),), ())
        return render(np.random.default_rng(8), scene).astype(int)

    mask = np.zeros((168, 168))
    mask[50:90, 60:100] = shape_mask(kind, 40)
    painted, other = paint(color), paint("red" if color != "red" else "cyan")
    mean = painted[mask == 1].mean(axis=0)
    assert min(COLORS, key=lambda name: float(np.abs(mean - COLORS[name]).sum())) == color
    assert np.array_equal(painted[mask == 0], other[mask == 0])
    assert (painted != other)[mask == 1].any(axis=1).all()


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("text", ["07", "QJ", "RADIO"])
def test_a_sign_shows_its_text(color: str, text: str) -> None:
    size = sign_size(text, FONTS[0], 18)
    scene = Scene(168, 168, (), (Sign(color, text, FONTS[0], 18, Box(30, 40, *size)),))
    window = render(np.random.default_rng(2), scene)[40 : 40 + size[1], 30 : 30 + size[0]].astype(float)
    mask = text_mask(text, FONTS[0], 18)
    rows, columns = mask.shape
    inked = window[3 : 3 + rows, 4 : 4 + columns].mean(axis=2)
    assert abs(inked[mask > 0.95].mean() - inked[mask == 0].mean()) > 60
    assert min(COLORS, key=lambda name: float(np.abs(window[0] - COLORS[name]).sum())) == color


@pytest.mark.parametrize("size", CANVASES)
def test_pictures_fill_their_canvas(size) -> None:
    for index in range(8):
        picture = make_sample(1, index, Style(*size)).picture
        assert picture.shape == (size[1], size[0], 3) and picture.dtype == np.uint8
        assert picture[-1].any() and picture[:, -1].any()


def test_half_of_the_pictures_are_noisy() -> None:
    rng = np.random.default_rng(0)
    deviations = [draw_noise(rng) for _ in range(1000)]
    assert 0.44 < np.mean([deviation == 0 for deviation in deviations]) < 0.56 and max(deviations) < 6
    grey = np.full((200, 300, 3), 128, np.uint8)
    assert add_noise(rng, grey, 0.0) is grey
    noise = add_noise(rng, grey, 5.0).astype(float) - 128
    assert noise.std() == pytest.approx(5, abs=0.5) and (noise[..., 0] == noise[..., 2]).all()


def test_backgrounds_vary() -> None:
    pictures = {render(np.random.default_rng((4, index)), Scene(168, 168, (), ())).tobytes() for index in range(60)}
    assert len(pictures) == 60


def test_shapes_and_characters_look_different_from_each_other() -> None:
    for first, second in itertools.combinations(SHAPE_NAMES, 2):
        assert np.abs(shape_mask(first, 13) - shape_mask(second, 13)).mean() > 0.03, (first, second)
    for characters in (DIGITS, LETTERS.replace("Q", "")):
        for font in FONTS:
            masks = {character: text_mask(character, font, 10) for character in characters}
            for first, second in itertools.combinations(characters, 2):
                pair = masks[first], masks[second]
                canvas = np.zeros((2, 16, 16))
                for number, mask in enumerate(pair):
                    canvas[number, : mask.shape[0], : mask.shape[1]] = mask
                assert np.abs(canvas[0] - canvas[1]).sum() > 2, (font, first, second)


def test_characters_stand_on_one_line() -> None:
    for font in FONTS:
        height = text_mask("H", font, 18).shape[0]
        assert text_mask("HEIL", font, 18).shape[0] == height
        below = text_mask("HQ", font, 18)
        assert below.shape[0] > height and not below[height:, :10].any() and below[height:, 10:].any()


def test_an_altered_text_differs_in_little() -> None:
    rng = np.random.default_rng(0)
    for text in ("07", "KJ", "RADIO", "ZOO"):
        for _ in range(20):
            other = alter_text(rng, text)
            assert other != text and len(other) == len(text) and other.isdigit() == text.isdigit()
            assert (other in WORDS) == (text in WORDS)
            assert text in WORDS or sum(a != b for a, b in zip(text, other, strict=True)) == 1


def test_unknown_shapes_and_fonts_are_refused() -> None:
    with pytest.raises(SpecError, match="hexagon"):
        shape_mask("hexagon", 20)
    with pytest.raises(SpecError, match="Comic"):
        text_mask("12", "Comic.ttf", 12)


def test_the_vocabulary_is_complete_and_in_order() -> None:
    assert len(TOKENS) == len(set(TOKENS)) == 128
    assert TOKENS[:5] == ("<unk>", "<s>", "</s>", "<pad>", "<image>") and TOKENS[10:13] == ("USER:", "ASSISTANT:", "?")
    named = [token for token in TOKENS if not token.startswith("<unused")]
    assert tuple(named[-52:]) == (*COLORS, *SHAPE_NAMES, *DIGITS, *LETTERS)
    assert TOKENS[len(named) :] == tuple(f"<unused{number}>" for number in range(128 - len(named)))
    assert 115 <= len(WORDS) <= 125 and all(3 <= len(word) <= 5 and set(word) <= set(LETTERS) for word in WORDS)
    assert list(WORDS) == sorted(set(WORDS))


def test_styles_differ_only_where_they_say() -> None:
    style = Style(336, 224, big=0.3, font_sizes=(10, 12, 14))
    many = crowded(style)
    assert replace(many, shapes=style.shapes, signs=style.signs) == style
