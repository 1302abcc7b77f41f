"""Scorers agree with lmms-eval on drawn answers, and say which answers are invalid."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from answer_pairs import COUNT, METRICS, digest, pairs
from test_cli import fail

from mmcompress.evals.suites import SUITES
from mmcompress.evals.suites.base import Grade, Picture, Question, Scorer
from mmcompress.evals.suites.scoring import choice

LMMS = json.loads(Path(__file__).with_name("lmms_scores.json").read_text())


def graded(metric: str) -> tuple[Scorer, list[Question], list[Grade]]:
    questions = [
        Question(
            id=str(number),
            images=(Picture(str(number // 2)),),
            prompt="",
            answers=tuple(pair["answers"]),
            choices=tuple(pair.get("choices", ())),
            category=pair.get("category", ""),
        )
        for number, pair in enumerate(pairs(metric))
    ]
    scorer = SUITES[metric].scorer
    texts = [pair["text"] for pair in pairs(metric)]
    return scorer, questions, [scorer.grade(text, asked) for text, asked in zip(texts, questions, strict=True)]


def test_the_recorded_pairs_are_those_drawn_here() -> None:
    assert LMMS["pairs"] == digest(), "run record_lmms_scores.py anew"
    assert LMMS["scores"].keys() == METRICS.keys()


@pytest.mark.parametrize("metric", METRICS)
def test_every_answer_scores_as_in_lmms_eval(metric: str) -> None:
    grades = graded(metric)[2]
    recorded = LMMS["scores"][metric]
    differing = [
        (pair, score, grade)
        for pair, score, grade in zip(pairs(metric), recorded, grades, strict=True)
        if grade.score != pytest.approx(score, abs=1e-9)
    ]
    assert not differing, differing[:3]
    assert {0, 1} <= set(recorded)  # the pairs tell scorers apart


@pytest.mark.parametrize("metric", ["pope", "mme"])
def test_totals_are_those_of_lmms_eval(metric: str) -> None:
    scorer, questions, grades = graded(metric)
    totals = {name: values[0] for name, values in scorer.metrics(questions, grades, np.ones((1, COUNT))).items()}
    for name, recorded in LMMS["totals"][metric].items():
        assert totals[name] == pytest.approx(recorded), name


@pytest.mark.parametrize("metric", METRICS)
def test_weights_are_repetitions(metric: str) -> None:
    """A question of weight two counts as one asked twice, which is what the bootstrap needs."""
    scorer, questions, grades = graded(metric)
    images = np.random.default_rng(0).integers(0, 3, size=COUNT // 2)
    weights = np.repeat(images, 2)
    repeated = [
        (asked, grade) for asked, grade, times in zip(questions, grades, weights, strict=True) for _ in range(times)
    ]
    again, of_them = ([pair[part] for pair in repeated] for part in (0, 1))
    weighted = scorer.metrics(questions, grades, weights[None].astype(float))
    listed = scorer.metrics(again, of_them, np.ones((1, len(again))))  # type: ignore[arg-type]
    for name, values in listed.items():
        assert weighted[name][0] == pytest.approx(values[0]), name


@pytest.mark.parametrize(
    ("metric", "text", "answers", "score", "valid"),
    [
        ("vqav2", "The dog.", ["dog"] * 10, 1.0, True),
        ("vqav2", "dog", ["dog"] * 3 + ["cat"] * 7, 0.9, True),
        ("vqav2", "dog", ["dog"] + ["cat"] * 9, 0.3, True),
        ("vqav2", "the.", ["dog"] * 10, 0.0, False),
        ("textvqa", "10,000", ["10000"] * 10, 1.0, True),
        ("textvqa", "", ["10000"] * 10, 0.0, False),
        ("gqa", "Women.", ["women"], 1.0, True),
        ("gqa", "?", ["women"], 0.0, False),
        ("gqa", "125", ["12.5"], 1.0, True),
        ("jsonl", "125", ["12.5"], 0.0, True),
        ("jsonl", "12.50", ["twelve", "12.5"], 1.0, True),
        ("jsonl", "-5", ["5"], 0.0, True),
        ("jsonl", "1,200", ["1200"], 1.0, True),
        ("jsonl", "$12.50.", ["12.5"], 1.0, True),
        ("jsonl", "12.5", ["125."], 0.0, True),
        ("jsonl", "5", ["(5)"], 1.0, True),
        ("jsonl", "NaN", ["nan"], 1.0, True),
        ("jsonl", "Women.", ["women"], 1.0, True),
        ("jsonl", ".", ["women"], 0.0, False),
        ("docvqa", "university of  california", ["UC", "University of California"], 1.0, True),
        ("docvqa", "0.28x", ["0.28"], 0.8, True),
        ("docvqa", "nothing like it", ["0.28"], 0.0, True),
        ("docvqa", "", ["0.28"], 0.0, False),
        ("chartqa", "14.6", ["14"], 1.0, True),
        ("chartqa", "14.8", ["14"], 0.0, True),
        ("chartqa", "39.5%", ["0.395"], 1.0, True),
        ("chartqa", "yes", ["Yes"], 1.0, True),
        ("chartqa", "0.01", ["0"], 0.0, True),
        ("chartqa", "", ["0"], 0.0, False),
        ("ocrbench", "It reads: centre", ["CENTRE"], 1.0, True),
        ("ocrbench", "", ["CENTRE"], 0.0, False),
        ("pope", "Yes", ["yes"], 1.0, True),
        ("pope", " no\n", ["no"], 1.0, True),
        ("pope", "Yes, there is.", ["yes"], 1.0, False),
        ("pope", "No, sir", ["no"], 1.0, False),
        ("pope", "Yes. There is no dog.", ["yes"], 1.0, False),
        ("pope", "It is not. Yes", ["no"], 1.0, False),
        ("pope", "Nothing", ["no"], 0.0, False),
        ("pope", "", ["yes"], 1.0, False),
        ("mme", "Yes, there is.", ["yes"], 1.0, True),
        ("mme", "maybe", ["yes"], 0.0, False),
    ],
)
def test_grades_by_hand(metric: str, text: str, answers: list[str], score: float, valid: bool) -> None:
    grade = SUITES[metric].scorer.grade(text, Question("", (), "", tuple(answers)))
    assert (grade.score, grade.valid) == (pytest.approx(score), valid)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(C)", "C"),
        ("C. a boat", "C"),
        ("C) a boat", "C"),
        ("**C**", "C"),
        ("no idea", None),
        ("The answer is B.", "B"),
        ("Answer: C", "C"),
        ("It is (B), not a boat", "B"),
        ("A boat", None),
        ("a dog", "A"),
        ("dog", None),
        ("boat", "C"),
        ("B or C", None),
        ("E", None),
        ("", None),
        ("I see nothing", None),
    ],
)
def test_letters(text: str, letter: str | None) -> None:
    assert choice(text, ("a dog", "two cats", "boat")) == letter


@pytest.mark.parametrize(
    ("text", "answer", "score", "valid"),
    [
        ("12.5", "12.5", 1.0, True),
        ("12.50", "12.5", 1.0, True),
        ("The answer is 12.5", "12.5", 1.0, True),
        ("x = 3 * 4 = 12.5", "12.5", 1.0, True),
        ("so it is 13.\nThus 12.5 m", "12.5", 1.0, True),
        ("125", "12.5", 0.0, True),
        ("1.25", "12.5", 0.0, True),
        ("-12.5", "12.5", 0.0, True),
        ("", "12.5", 0.0, False),
        ("?", "12.5", 0.0, False),
        ("1,200", "1200", 1.0, True),
        ("3.43", "['24/7', '3.429']", 1.0, True),
        ("24/7", "['24/7', '3.429']", 1.0, True),
        ("3.4", "['24/7', '3.429']", 0.0, True),
        ("24", "['24/7', 3]", 0.0, True),
        ("3", "['24/7', 3]", 1.0, True),
        ("[0, 1)", "[0, 1)", 1.0, True),
        ("The Red Car", "red car", 1.0, True),
        ("exactly", "x", 0.0, True),
    ],
)
def test_open_questions_of_mmmu(text: str, answer: str, score: float, valid: bool, tmp_path: Path) -> None:
    row = {"index": "1", "question": "?", "answer": answer, "image": "A" * 100, "A": "", "B": ""}
    (tmp_path / "MMMU_DEV_VAL.tsv").write_text("\t".join(row) + "\n" + "\t".join(row.values()) + "\n")
    suite = SUITES["mmmu"](tmp_path)
    ((asked,), _) = suite.read()
    grade = suite.scorer.grade(text, asked)
    assert (grade.score, grade.valid) == (score, valid)


def test_broken_answers_do_not_raise_what_pope_tells() -> None:
    scorer = SUITES["pope"].scorer
    questions = [Question(str(number), (), "", (("no", "yes")[number % 2],)) for number in range(200)]

    def totals(texts: list[str]) -> dict[str, float]:
        grades = [scorer.grade(text, asked) for text, asked in zip(texts, questions, strict=True)]
        return {name: values[0] for name, values in scorer.metrics(questions, grades, np.ones((1, 200))).items()}

    perfect = dict.fromkeys(("F1", "accuracy", "precision", "recall"), 1.0) | {"said yes": 0.5}
    assert totals(["No", "Yes"] * 100) == totals(["No.", "Yes."] * 100) == perfect
    assert totals(["No", "Yes"] + ["the the"] * 198) == pytest.approx(
        {"F1": 200 / 299, "accuracy": 101 / 200, "precision": 100 / 199, "recall": 1.0, "said yes": 199 / 200}
    )
    assert totals(["No", "Yes"] + ["not the"] * 198)["recall"] == 0.01


@pytest.mark.parametrize("suite", ["docvqa", "infovqa"])
def test_anls_star_is_missed_before_the_model_is_loaded(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anls_star", None)
    said = fail("eval", "./nowhere", "--suite", suite, "--data", Path(__file__).parent / "suites")
    assert "ANLS needs anls-star: pip install 'mmcompress[evals]'" in " ".join(said.split())
    assert SUITES[suite].scorer.metric == "ANLS"  # to list suites takes no package
