"""The result of an evaluation as JSON: every answer, the numbers made of them, and what made them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.errors import InputError
from mmcompress.evals import result_file
from mmcompress.evals.answers import Answers, Key, write_whole
from mmcompress.evals.report import budget_key
from mmcompress.evals.runner import Cost, Run, configure
from mmcompress.evals.statistics import NORMAL_95, bootstrap_weights, interval
from mmcompress.evals.suites.base import Grade, Problem, Question, Scorer

FORMAT = "mmcompress-results"
VERSION = 1
RESAMPLES = 1000
_PARTS = ("model", "seed", "environment", "left_out", "suites", "runs", "samples")

Record = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A suite as it is asked here: its drawn questions, and the rows that cannot be asked."""

    label: str
    scorer: Scorer
    max_new_tokens: int
    questions: Sequence[Question]
    problems: Sequence[Problem]


def suite_record(asked: Asked, answers: Answers, runs: Sequence[Run], seed: int) -> tuple[Record, list[Record]]:
    """A suite and what every run makes of it; questions that not all runs have answered are left out.

    The first run is what others are compared with. Intervals come of the same resamples of images for all runs.
    """
    questions = [
        question
        for question in asked.questions
        if all(Key.of(asked.label, question.id, run) in answers for run in runs)
    ]
    suite = {
        "metric": asked.scorer.metric,
        "unit": asked.scorer.unit,
        "invalid": asked.scorer.invalid,
        "problems": [asdict(problem) for problem in asked.problems],
        "questions": [_question_record(question) for question in questions],
    }
    if not questions:
        return suite, [{} for _ in runs]
    by_run = []
    for run in runs:
        known = [answers.known[Key.of(asked.label, question.id, run)] for question in questions]
        grades = [asked.scorer.grade(text, question) for (text, _), question in zip(known, questions, strict=True)]
        by_run.append(([text for text, _ in known], grades, Cost.of([spent for _, spent in known])))
    resampled = _resampled(asked.scorer, questions, [grades for _, grades, _ in by_run], seed)
    controls = {budget_key(run.keep, run.kv): number for number, run in enumerate(runs) if run.method == "random"}
    records = []
    for number, (run, (texts, grades, cost)) in enumerate(zip(runs, by_run, strict=True)):
        control = controls.get(budget_key(run.keep, run.kv)) if run.method not in (None, "random") else None
        records.append(
            {
                "metrics": _metrics(asked.scorer, questions, grades),
                "margin": _finite(NORMAL_95 * float(np.std(resampled[number], ddof=1))),
                "retained": _retained(asked.scorer, questions, [by_run[0][1], grades], resampled[[0, number]]),
                "versus_random": None
                if control is None
                else _difference(asked.scorer, questions, [by_run[control][1], grades], resampled[[control, number]]),
                "invalid": sum(not grade.valid for grade in grades) / len(grades),
                "categories": _categories(questions, grades),
                "cost": asdict(cost),
                "answers": texts,
                "scores": [grade.score for grade in grades],
                "valid": [grade.valid for grade in grades],
            }
        )
    return suite, records


def overall(records: Sequence[Record]) -> list[Record]:
    """Per run the mean over suites of what is retained, and of what it costs; `records` by run, then suite.

    The mean has no margin where one of them has no interval.
    """
    means = []
    for by_suite in records:
        known = [suite["retained"] for suite in by_suite.values() if suite.get("retained")]
        half = [(part["high"] - part["low"]) / 2 for part in known if part["high"] is not None]
        value = float(np.mean([part["value"] for part in known])) if known else None
        costs = [suite["cost"] for suite in by_suite.values() if suite]
        # Suites are independent of each other, so that their squared errors add up.
        complete = len(half) == len(known) > 0
        margin = math.sqrt(sum(width**2 for width in half)) / len(known) if complete else None
        means.append(
            {
                "retained": None if value is None else {"value": value, "margin": margin},
                "share_of_tokens": float(np.mean([cost["tokens_per_layer"] / cost["tokens"] for cost in costs])),
                "kv_bytes": float(np.mean([cost["kv_bytes"] for cost in costs])),
            }
            if costs
            else {}
        )
    return means


def save(record: Record, path: Path) -> None:
    """Write it as JSON."""
    write_whole(path, json.dumps({"format": FORMAT, "version": VERSION, **record}, allow_nan=False) + "\n")


def load(path: Path) -> Record:
    """Read the result file `path`, or the one in a folder.

    Raises:
        InputError: it is missing, damaged or no result of an evaluation.
        SpecError: another version of mmcompress with another format wrote it.
    """
    return checked(result_file.read(path, {FORMAT: VERSION}), path)


def checked(record: Record, path: Path) -> Record:
    """`record` itself.

    Raises:
        InputError: it lacks what every result of an evaluation has.
    """
    lacking = [part for part in _PARTS if part not in record]
    if lacking:
        raise InputError(f"{path} is damaged: it lacks {', '.join(lacking)}.")
    for run in record["runs"]:
        for label, suite in record["suites"].items():
            if len(run["suites"].get(label, {}).get("scores", ())) != len(suite["questions"]):
                raise InputError(f"{path} is damaged: {run['label']} has not one score for each question of {label}.")
    return record


def run_record(run: Run) -> Record:
    """What a run is."""
    return {**run._asdict(), "label": run.label, "spec": configure(*run).to_dict()}


def _question_record(question: Question) -> Record:
    return {
        "id": question.id,
        "images": [picture.name for picture in question.images],
        "prompt": question.prompt,
        "answers": list(question.answers),
        "choices": list(question.choices),
        "category": question.category,
    }


def _metrics(scorer: Scorer, questions: Sequence[Question], grades: Sequence[Grade]) -> dict[str, float]:
    found = scorer.metrics(questions, grades, np.ones((1, len(questions))))
    return {name: float(values[0]) for name, values in found.items()}


def _resampled(
    scorer: Scorer, questions: Sequence[Question], runs: Sequence[Sequence[Grade]], seed: int
) -> np.ndarray[Any, Any]:
    """The metric of every run on resampled images, `[runs, RESAMPLES]`; NaN of one image."""
    clusters = [question.cluster for question in questions]
    if len(set(clusters)) < 2:  # every resample would be that image again, which says nothing of others
        return np.full((len(runs), RESAMPLES), np.nan)
    chunks = [
        [scorer.metrics(questions, grades, weights)[scorer.metric] for grades in runs]
        for weights in bootstrap_weights(clusters, RESAMPLES, seed)
    ]
    return np.concatenate(chunks, axis=1)


def _retained(
    scorer: Scorer, questions: Sequence[Question], pair: Sequence[Sequence[Grade]], resampled: np.ndarray[Any, Any]
) -> Record | None:
    """The share of the first run's metric that the second has, with the 95 % interval of the resampled shares."""
    before, after = (_metrics(scorer, questions, grades)[scorer.metric] for grades in pair)
    if not before:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = resampled[1] / resampled[0]
    low, high = interval(np.where(np.isfinite(shares), shares, np.nan))
    return {"value": after / before, "low": _finite(low), "high": _finite(high)}


def _difference(
    scorer: Scorer, questions: Sequence[Question], pair: Sequence[Sequence[Grade]], resampled: np.ndarray[Any, Any]
) -> Record:
    control, value = (_metrics(scorer, questions, grades)[scorer.metric] for grades in pair)
    error = float(np.std(resampled[1] - resampled[0], ddof=1))
    return {"value": value - control, "error": _finite(error)}


def _categories(questions: Sequence[Question], grades: Sequence[Grade]) -> dict[str, float]:
    """The mean score by category, where there is more than one."""
    scores: dict[str, list[float]] = {}
    for question, grade in zip(questions, grades, strict=True):
        scores.setdefault(question.category, []).append(grade.score)
    return {name: sum(of) / len(of) for name, of in sorted(scores.items())} if len(scores) > 1 else {}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
