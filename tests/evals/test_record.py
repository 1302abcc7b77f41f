"""What is made of answers: shares and errors of runs beside each other, and the tables and CSVs that say them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mmcompress.accounting import StageSeconds
from mmcompress.evals import report, report_html
from mmcompress.evals.answers import Answers, Key
from mmcompress.evals.backends import Terms
from mmcompress.evals.comparison import Comparison, as_record
from mmcompress.evals.record import Asked
from mmcompress.evals.runner import Run, Spent
from mmcompress.evals.suites import scoring
from mmcompress.evals.suites.base import Picture, Question, Scorer

RUNS = [Run(None, 1.0), Run("random", 0.25), Run("todre", 0.25)]
SPENT = Spent(1, 10, 5, 5.0, 1, 1.0, vars(StageSeconds()))

Said = Callable[[Run, int], str]


def questions(images: Sequence[str], categories: Sequence[str] = ("",)) -> list[Question]:
    """Whose right answers are yes and no in turn."""
    return [
        Question(str(number), (Picture(image),), "?", ("no" if number % 2 else "yes",), category=category)
        for number, (image, category) in enumerate(zip(images, [*categories] * len(images), strict=False))
    ]


def result(
    folder: Path, suites: dict[str, tuple[Scorer, list[Question]]], said: Said, runs: list[Run] = RUNS
) -> dict[str, Any]:
    """The result of an evaluation in which every run `said` that to a question of that number."""
    with Answers(folder, {}) as answers:
        answers.add(
            (Key.of(label, asked.id, run), said(run, number), SPENT)
            for label, (_, all_asked) in suites.items()
            for number, asked in enumerate(all_asked)
            for run in runs
        )
    asked = [Asked(label, scorer, 8, all_asked, []) for label, (scorer, all_asked) in suites.items()]
    return as_record(asked, answers, Comparison(runs, {}), Terms("m"), {}) | {"samples": []}


def yes(run: Run, number: int) -> str:
    """Right every other time, and of todre a little more often."""
    return "no" if run.method == "todre" and number == 1 else "yes"


def test_one_image_says_nothing_of_others(tmp_path: Path) -> None:
    suites = {"one": (scoring.EXACT, questions(["a"] * 6)), "many": (scoring.EXACT, questions("abcdef"))}
    made = result(tmp_path, suites, yes)
    todre = made["runs"][2]
    assert todre["suites"]["one"]["metrics"]["exact match"] == todre["suites"]["many"]["metrics"]["exact match"]
    for run in made["runs"]:
        of_one, of_many = run["suites"]["one"], run["suites"]["many"]
        assert of_one["margin"] is None and of_many["margin"] > 0
        assert (of_one["retained"]["low"], of_one["retained"]["high"]) == (None, None)
        assert of_many["retained"]["low"] is not None and of_many["retained"]["high"] is not None
        # What is unknown of one suite is unknown of the mean.
        assert run["retained"]["value"] > 0 and run["retained"]["margin"] is None
    assert todre["suites"]["one"]["versus_random"] == {"value": pytest.approx(1 / 6), "error": None}
    assert todre["suites"]["many"]["versus_random"]["error"] > 0
    assert not any("±" in cell or "[" in cell for cells in report.rows(made, "one") for cell in cells)
    assert any("±" in cell for cells in report.rows(made, "many") for cell in cells)
    alone = result(tmp_path / "alone", {"many": suites["many"]}, yes)
    assert alone["runs"][2]["retained"]["margin"] > 0


def test_one_token_is_not_all_tokens(tmp_path: Path) -> None:
    runs = [Run(None, 1.0), *(Run(method, keep) for keep in (1, 1.0) for method in ("random", "todre"))]

    def said(run: Run, number: int) -> str:
        right = {("random", "1"): 2, ("todre", "1"): 5}.get((run.method or "", repr(run.keep)), 8)
        return ("no" if number % 2 else "yes") if number < right else "maybe"

    made = result(tmp_path, {"s": (scoring.EXACT, questions("abcdefgh"))}, said, runs)
    against = [run["suites"]["s"]["versus_random"] for run in made["runs"]]
    assert against[2]["value"] == pytest.approx(3 / 8) and against[4]["value"] == 0
    assert [row.end_section for row in report.table(made, "s").rows] == [True, False, True, False, True]
    # The unpruned model begins a group, and so does either budget.
    assert report_html.evaluation(tmp_path, made).count('<tr class="first">') == 3


def test_a_csv_holds_all_metrics_and_categories(tmp_path: Path) -> None:
    pairs = questions("aabbcc", ("OCR", "OCR", "existence", "existence", "code_reasoning", "code_reasoning"))
    suites = {"mme": (scoring.MME, pairs), "own": (scoring.EXACT, questions("abcdef"))}
    made = result(tmp_path, suites, yes)
    rows = list(csv.DictReader(io.StringIO(report.as_csv(report.lines(made)))))
    of_mme, of_own = rows[2], rows[5]
    assert (of_mme["method"], of_mme["suite"], of_own["suite"]) == ("todre", "mme", "own")
    found = made["runs"][2]["suites"]["mme"]
    assert len(found["metrics"]) > 1 and set(found["categories"]) == {"OCR", "existence", "code_reasoning"}
    for kind, values in (("metric", found["metrics"]), ("category", found["categories"])):
        for name, value in values.items():
            assert float(of_mme[f"{kind}: {name}"]) == value
            assert of_own[f"{kind}: {name}"] == ""
    assert of_mme["metric: exact match"] == "" and float(of_own["metric: exact match"]) == float(of_own["value"])
    assert float(of_own["versus_random"]) == made["runs"][2]["suites"]["own"]["versus_random"]["value"] > 0
    assert float(of_own["versus_random_error"]) == made["runs"][2]["suites"]["own"]["versus_random"]["error"] > 0
    assert rows[3]["versus_random"] == rows[3]["versus_random_error"] == ""
    headings = {name for label in suites for name, _ in report.columns(made, label)}
    assert not [name for name in headings if ":" in name]
