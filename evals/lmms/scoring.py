"""The scores of an lmms-eval task, by its own filters, marking and aggregation."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, cast

import numpy as np
from lmms_eval.api.instance import Instance
from lmms_eval.api.reasoning import parse_reasoning_tags_config, strip_reasoning_tags
from lmms_eval.api.registry import get_aggregation
from tenacity import RetryError

from mmcompress.errors import InputError
from mmcompress.evals.lmms.documents import Document, targets
from mmcompress.evals.suites.base import Array, Grade, Question, Scorer

REASONING = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'
"""Tags that `lmms_eval` cuts out of answers unless told otherwise."""


@dataclass(frozen=True)
class Marked(Grade):
    """A grade with what the task made of the answer, by metric."""

    results: Mapping[str, Any] = field(default_factory=dict)


def scorer(name: str, task: Any, metric: str) -> Scorer:
    """How a loaded task scores `metric`.

    A task that has no score for the right answer to its first document is found out here, before anything is asked.

    Raises:
        InputError: it has none.
    """
    aggregate = task.aggregation()[metric]

    def grade(text: str, question: Question) -> Grade:
        return _grade(name, task, metric, text, cast(Document, question).number)

    def metrics(questions: Sequence[Question], grades: Sequence[Grade], weights: Array) -> dict[str, Array]:
        marked = [cast(Marked, grade).results for grade in grades]
        counted = [number for number, results in enumerate(marked) if metric in results]
        if not counted:
            raise InputError(f"task {name}: no question asked counts for {metric}.")
        return {metric: _values(aggregate, [marked[number][metric] for number in counted], weights[:, counted])}

    right = _grade(name, task, metric, targets(task, 0)[0], 0)
    return Scorer(metric, grade, metrics, unit=_unit(aggregate, right, metric))


def _grade(name: str, task: Any, metric: str, text: str, number: int) -> Marked:
    document = task.eval_docs_no_media[number]
    instance = Instance("generate_until", (), 0, metadata={"task": name, "doc_id": number, "repeats": 1}, resps=[text])
    ensemble = task._filters[0]  # the one whose numbers come first
    ensemble.apply([instance], [document])
    read = _without_reasoning(instance.filtered_resps[ensemble.name], task)
    try:
        results = task.process_results(document, [read])
        score = _score(task.aggregation()[metric], results, metric)
    except Exception as error:  # tasks are anyone's code
        raise InputError(
            f"task {name} cannot score the answer {text!r} to document {number}: {cause(error)}"
        ) from error
    return Marked(score, bool(text.strip()), str(read), results)


def _without_reasoning(read: Any, task: Any) -> Any:
    """What filters made of an answer, or several of one, without what was thought aloud."""
    tags = parse_reasoning_tags_config(REASONING, task.config.reasoning_tags)
    if tags is None:
        return read
    if isinstance(read, list):
        return [_without_reasoning(part, task) for part in read]
    return strip_reasoning_tags(read, tags) if isinstance(read, str) else read


def _score(aggregate: Callable[..., Any], results: Mapping[str, Any], metric: str) -> float:
    """What an answer is worth: its own score, or else the metric of it alone; nothing if it does not count."""
    item = results.get(metric, 0.0)
    if isinstance(item, Mapping):
        item = item.get("score", item)
    return float(item if isinstance(item, Real) else _quietly(aggregate, [item]))


def _unit(aggregate: Callable[..., Any], right: Marked, metric: str) -> float:
    """100 for shares, 1 for what is counted otherwise, such as points: told by what a right answer is worth."""
    try:
        worth = _quietly(aggregate, [right.results[metric]])
    except Exception:  # an aggregation that takes no single answer adds up points
        return 1.0
    return 100.0 if worth <= 1 else 1.0


def _values(aggregate: Callable[..., Any], items: Sequence[Any], weights: Array) -> Array:
    """The metric `[samples]` of `items` taken as often as `weights [samples, items]` say.

    An aggregation may refuse answers that are there twice, as MME's does; then no resample has a value.

    Raises:
        InputError: nor have the answers themselves.
    """
    if aggregate is get_aggregation("mean") and all(isinstance(item, Real) for item in items):
        with np.errstate(invalid="ignore"):
            return weights @ np.array(items, dtype=float) / weights.sum(axis=1)
    try:
        return np.array([_quietly(aggregate, _taken(items, counts)) for counts in weights])
    except Exception as error:
        if (weights == 1).all():
            raise InputError(f"the task's aggregation fails: {cause(error)}") from error
        return np.full(len(weights), np.nan)


def _taken(items: Sequence[Any], counts: Array) -> list[Any]:
    return [item for item, count in zip(items, counts, strict=True) for _ in range(int(count))]


def _quietly(aggregate: Callable[..., Any], items: Sequence[Any]) -> float:
    """The aggregate without what it prints."""
    with redirect_stdout(io.StringIO()):
        return float(aggregate(items))


def cause(error: Exception) -> str:
    """What went wrong, without the attempts to do it again."""
    found = error.last_attempt.exception() if isinstance(error, RetryError) else error
    return " ".join(f"{type(found).__name__}: {found}".split())
