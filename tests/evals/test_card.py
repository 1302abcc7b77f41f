"""Cards say what was measured, of every type and form, and come out of the committed records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmcompress.evals.micro import MODELS, Question
from mmcompress.evals.micro.card import ACCURACY, accuracies, card, fresh
from mmcompress.evals.micro.questions import TYPES
from mmcompress.evals.micro.training.recipes import RECIPES
from mmcompress.evals.micro.training.trainer import CURVES, LOG
from mmcompress.evals.runner import Answer


def test_fresh_questions_are_the_same_every_time() -> None:
    recipe = RECIPES["micro-qwen2.5-vl"]
    exam, again = fresh(recipe, 40), fresh(recipe, 40)
    assert len(exam.questions) == 40 and exam.questions == again.questions
    assert {asked.image for asked in exam.questions} <= set(exam.pictures)
    assert {picture.size for picture in exam.pictures.values()} == {recipe.canvases[0]}
    assert {asked.type for asked in exam.questions} == set(TYPES)


def test_accuracies_by_type_and_form() -> None:
    forms = [("exist", "exist"), ("read", "word"), ("read", "number"), ("read", "word")]
    questions = [Question(n, str(n % 2), "", "", kind, form) for n, (kind, form) in enumerate(forms)]
    answers = [Answer("", n != 1, n != 3) for n in range(4)]
    table = accuracies(answers, questions)
    assert list(table) == ["all", "exist", "read", "read: number", "read: word"]
    assert [row["mean"] for row in table.values()] == [0.75, 1.0, pytest.approx(2 / 3), 1.0, 0.5]
    assert [row["questions"] for row in table.values()] == [4, 1, 3, 1, 2]
    assert table["read"]["invalid"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", [name for name in MODELS if name in RECIPES])
def test_the_committed_card_is_of_the_committed_record(name: str) -> None:
    folder = MODELS[name]
    record = json.loads((folder / ACCURACY).read_text())
    log = [json.loads(row) for row in (folder / LOG).read_text().splitlines()]
    assert (folder / "README.md").read_text() == card(record, log)
    assert record["questions"] >= 10_000 and (folder / CURVES).exists()


@pytest.mark.parametrize("name", MODELS)
def test_models_are_small(name: str) -> None:
    files = [path for path in MODELS[name].rglob("*") if path.is_file()]
    assert not [path for path in files if path.stat().st_size > 16 * 2**20 or path.suffix in (".pt", ".new")]
    assert (MODELS[name] / "README.md").exists()


def test_a_matryoshka_model_says_what_it_was_trained_for() -> None:
    folder = MODELS["micro-llava-m3"]
    scales = json.loads((folder / "config.json").read_text())["matryoshka_scales"]
    trained = [json.loads(row)["budget"] for row in (folder / LOG).read_text().splitlines()]
    assert scales == sorted({*trained}) == [1, 4, 16, 64, 256]


def test_the_model_in_the_wheel_is_small() -> None:
    folder = Path(MODELS["micro-llava"])
    assert sum(path.stat().st_size for path in folder.glob("*")) < 10 * 2**20
