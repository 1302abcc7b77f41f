"""The embedded model and MicroVQA: reproducible, unambiguous, right, small and readable by the model."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmcompress.errors import SpecError
from mmcompress.evals.micro import MICROVQA_PATH, MODEL_PATH, Question, load_microvqa, prompt
from mmcompress.evals.micro.build import MICROVQA_IMAGES, MICROVQA_SEED, Sample, build, make_sample
from mmcompress.evals.micro.masks import shape_mask
from mmcompress.evals.micro.questions import ask
from mmcompress.evals.micro.render import render
from mmcompress.evals.micro.scene import CANVAS, Box, Scene, Shape, draw_scene
from mmcompress.evals.micro.vocabulary import COLORS, SHAPE_NAMES, UNSEEN_PAIRS

TYPES = {"exist", "attribute", "count", "read", "choice", "spatial"}


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [make_sample(MICROVQA_SEED, index) for index in range(MICROVQA_IMAGES)]


def test_equal_arguments_give_equal_samples_and_other_arguments_give_others() -> None:
    first, again = make_sample(3, 5), make_sample(3, 5)
    assert first.scene == again.scene and first.questions == again.questions
    assert np.array_equal(first.picture, again.picture)
    for other in (make_sample(3, 6), make_sample(4, 5)):
        assert other.scene != first.scene
        assert not np.array_equal(other.picture, first.picture)


def test_the_committed_split_is_what_the_generator_makes(samples: list[Sample]) -> None:
    rows = [
        Question(0, f"images/{index:03d}.png", question, answer, kind)
        for index, sample in enumerate(samples)
        for kind, question, answer in sample.questions
    ]
    expected = [Question(number, row.image, row.question, row.answer, row.type) for number, row in enumerate(rows)]
    assert load_microvqa() == expected
    for index, sample in enumerate(samples):
        with Image.open(MICROVQA_PATH / "images" / f"{index:03d}.png") as image:
            assert image.mode == "RGB" and image.size == (CANVAS, CANVAS)
            assert np.array_equal(np.asarray(image), sample.picture), f"picture {index} differs"


def test_build_writes_the_committed_files_again(tmp_path: Path) -> None:
    questions = build(tmp_path / "split", images=2)
    committed = (MICROVQA_PATH / "questions.jsonl").read_text().splitlines()
    assert (tmp_path / "split" / "questions.jsonl").read_text().splitlines() == committed[: len(questions)]
    assert sorted(path.name for path in (tmp_path / "split" / "images").iterdir()) == ["000.png", "001.png"]


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="images"):
        build(tmp_path / "new", images=0)
    with pytest.raises(SpecError, match="seed"):
        make_sample(-1, 0)
    with pytest.raises(SpecError, match="limit"):
        load_microvqa(0)
    with pytest.raises(SpecError, match="hexagon"):
        shape_mask("hexagon", 20)
    (tmp_path / "keep.txt").write_text("")
    with pytest.raises(SpecError, match="not empty"):
        build(tmp_path, images=1)
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


def test_limit_gives_the_first_questions() -> None:
    assert load_microvqa(9) == load_microvqa()[:9] and len(load_microvqa(9)) == 9


def test_rows_hold_exactly_the_five_fields() -> None:
    for line in (MICROVQA_PATH / "questions.jsonl").read_text().splitlines():
        assert list(json.loads(line)) == ["question_id", "image", "question", "answer", "type"]


def test_objects_stay_on_the_canvas_and_apart(samples: list[Sample]) -> None:
    for sample in samples:
        covered = np.zeros((CANVAS, CANVAS), int)
        boxes = [shape.box for shape in sample.scene.shapes] + [sign.box for sign in sample.scene.signs]
        for x, y, width, height in boxes:
            assert min(x, y) >= 1 and x + width < CANVAS and y + height < CANVAS
            covered[y : y + height, x : x + width] += 1
        assert covered.max() == 1
        assert not UNSEEN_PAIRS & {(shape.color, shape.kind) for shape in sample.scene.shapes}
        assert 1 <= len(sample.scene.shapes) <= 6 and 1 <= len(sample.scene.signs) <= 2


@pytest.mark.parametrize("kind", SHAPE_NAMES)
@pytest.mark.parametrize("color", COLORS)
def test_a_shape_is_painted_in_its_color_and_nowhere_else(color: str, kind: str) -> None:
    def paint(name: str) -> np.ndarray:
        return render(np.random.default_rng(8), Scene((Shape(name, kind, Box(60, 50, 40, 40)),), ())).astype(int)

    mask = np.zeros((CANVAS, CANVAS))
    mask[50:90, 60:100] = shape_mask(kind, 40)
    painted, other = paint(color), paint("red" if color != "red" else "cyan")
    mean = painted[mask == 1].mean(axis=0)
    assert min(COLORS, key=lambda name: float(np.abs(mean - COLORS[name]).sum())) == color
    assert np.array_equal(painted[mask == 0], other[mask == 0])
    assert (painted != other)[mask == 1].any(axis=1).all()


def test_shapes_look_different_from_each_other() -> None:
    for first, second in itertools.combinations(SHAPE_NAMES, 2):
        assert np.abs(shape_mask(first, 13) - shape_mask(second, 13)).mean() > 0.03, (first, second)


def test_every_type_is_asked_about_as_often_as_possible() -> None:
    questions = load_microvqa()
    counts = Counter(question.type for question in questions)
    assert set(counts) == TYPES
    assert counts["exist"] == counts["count"] == counts["read"] == MICROVQA_IMAGES
    assert all(counts[kind] >= 0.85 * MICROVQA_IMAGES for kind in ("choice", "spatial"))
    assert counts["attribute"] >= 1.7 * MICROVQA_IMAGES
    for kind in ("exist", "spatial"):
        answers = Counter(question.answer for question in questions if question.type == kind)
        assert set(answers) == {"yes", "no"}
        assert 0.35 < answers["yes"] / counts[kind] < 0.65
    letters = Counter(question.answer for question in questions if question.type == "choice")
    assert set(letters) == set("ABCD") and min(letters.values()) >= 10


def answer_from(scene: Scene, question: str) -> set[str]:
    """Every answer `question` could have in `scene`: one exactly if its referent is unique."""
    pairs = [(shape.color, shape.kind) for shape in scene.shapes]
    if found := re.fullmatch(r"is there a (\w+) (\w+) \?", question):
        return {"yes" if found.groups() in pairs else "no"}
    if found := re.fullmatch(r"what color is the (\w+) \?", question):
        return {color for color, _ in _occurring_once(pairs, 1, found[1])}
    if found := re.fullmatch(r"what shape is (\w+) \?", question):
        return {kind for _, kind in _occurring_once(pairs, 0, found[1])}
    if found := re.fullmatch(r"how many (\w+) shapes \?", question):
        return {str([color for color, _ in pairs].count(found[1]))}
    if found := re.fullmatch(r"how many (\w+) \?", question):
        assert found[1] in SHAPE_NAMES
        return {str([kind for _, kind in pairs].count(found[1]))}
    if found := re.fullmatch(r"what number is on the (\w+) sign \?", question):
        return {f"{sign.number[0]} {sign.number[1]}" for sign in scene.signs if sign.color == found[1]}
    if found := re.fullmatch(r"which color is the (\w+) \? A (\w+) B (\w+) C (\w+) D (\w+)", question):
        kind, *options = found.groups()
        assert len(set(options)) == 4
        return {"ABCD"[options.index(color)] for color, _ in _occurring_once(pairs, 1, kind)}
    found = re.fullmatch(r"is the (\w+) (\w+) (left|right|above|below) the (\w+) (\w+) \?", question)
    assert found, f"unknown question: {question}"
    first, second = (found[1], found[2]), (found[4], found[5])
    assert first != second and pairs.count(first) == pairs.count(second) == 1
    boxes = [scene.shapes[pairs.index(pair)].box for pair in (first, second)]
    across, down = (2 * (boxes[0][axis] - boxes[1][axis]) + boxes[0][axis + 2] - boxes[1][axis + 2] for axis in (0, 1))
    assert abs(across if found[3] in ("left", "right") else down) >= 40, "too close to call"
    holds = {"left": across < 0, "right": across > 0, "above": down < 0, "below": down > 0}[found[3]]
    return {"yes" if holds else "no"}


def _occurring_once(pairs: list[tuple[str, str]], part: int, word: str) -> list[tuple[str, str]]:
    matching = [pair for pair in pairs if pair[part] == word]
    return matching if len(matching) == 1 else []


def test_every_committed_answer_is_right_and_the_only_one(samples: list[Sample]) -> None:
    for row in load_microvqa():
        scene = samples[int(Path(row.image).stem)].scene
        assert answer_from(scene, row.question) == {row.answer}, row


def test_every_new_answer_is_right_and_the_only_one() -> None:
    for index in range(500):
        rng = np.random.default_rng((10, index))
        scene = draw_scene(rng)
        for row in ask(rng, scene):
            assert answer_from(scene, row.question) == {row.answer}, row


def test_existence_is_balanced_and_cannot_be_guessed_from_one_word() -> None:
    answers, colors, kinds = [], [], []
    for index in range(1500):
        rng = np.random.default_rng((9, index))
        scene = draw_scene(rng)
        question = ask(rng, scene)[0]
        assert question.type == "exist"
        answers.append(question.answer)
        if question.answer == "no":
            color, kind = question.question.split()[3:5]
            assert (color, kind) not in UNSEEN_PAIRS
            colors.append(color in {shape.color for shape in scene.shapes})
            kinds.append(kind in {shape.kind for shape in scene.shapes})
    assert 0.46 < answers.count("yes") / len(answers) < 0.54
    # Words drawn blindly would occur in the scene in 46 % and 38 % of the cases.
    assert np.mean(colors) > 0.62 and np.mean(kinds) > 0.54


def test_every_word_is_in_the_vocabulary_of_the_model() -> None:
    vocabulary = json.loads((MODEL_PATH / "tokenizer.json").read_text())["model"]["vocab"]
    words = {word for row in load_microvqa() for word in f"{row.question} {row.answer}".split(" ")}
    assert words <= set(vocabulary)


def test_the_data_is_small() -> None:
    files = [path for path in MICROVQA_PATH.rglob("*") if path.is_file()]
    assert len(files) == MICROVQA_IMAGES + 1
    assert sum(path.stat().st_size for path in files) <= 8_000_000


def test_importing_the_package_needs_no_drawing_library() -> None:
    code = """
import sys
import mmcompress.evals
before = set(sys.modules)
import mmcompress.evals.micro
mmcompress.evals.micro.load_microvqa()
print(sorted({"matplotlib", "PIL", "torch"} & (set(sys.modules) - before)))
"""
    root = MICROVQA_PATH.parents[3]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_prompt_is_what_the_chat_template_writes() -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(MODEL_PATH, local_files_only=True)
    question = "is there a red star ?"
    assert prompt(question) == "<s> USER: <image> is there a red star ? ASSISTANT:"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    templated = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    picture = Image.open(MICROVQA_PATH / "images" / "000.png")
    ids = processor(images=picture, text=prompt(question))["input_ids"][0]
    assert list(ids) == list(processor(images=picture, text=templated)["input_ids"][0])
    tokens = processor.tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["<s>", "USER:", *["<image>"] * 144, *question.split(), "ASSISTANT:"]


def test_the_model_loads_offline_and_answers() -> None:
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model, loading = LlavaForConditionalGeneration.from_pretrained(
        MODEL_PATH, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not any(loading.values()), loading
    processor = AutoProcessor.from_pretrained(MODEL_PATH, local_files_only=True)
    rows = [row for row in load_microvqa(40) if row.type in ("exist", "attribute", "read")]
    right = 0
    for row in rows:
        with Image.open(MICROVQA_PATH / row.image) as image:
            inputs = processor(images=image, text=prompt(row.question), return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=3)
        right += processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == row.answer
    assert right >= 0.9 * len(rows)
