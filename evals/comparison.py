"""Methods beside each other on one model: what can be run, running it, and writing down what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmcompress.budget import Budget
from mmcompress.errors import MMCompressError
from mmcompress.evals import report
from mmcompress.evals.environment import environment
from mmcompress.evals.micro import Question
from mmcompress.evals.runner import Images, Result, Run, configure, evaluate
from mmcompress.evals.statistics import clustered_mean
from mmcompress.integrations.hf import wrap
from mmcompress.integrations.hf.capability import workable
from mmcompress.registry import METHODS

BASELINES = ("random", "uniform")
BATCH_SIZE = 64


@dataclass(frozen=True)
class Comparison:
    """Runs that a model allows, and why it allows no others.

    Args:
        runs: the unpruned model, then every method at every budget, those without a budget at the end.
        left_out: what cannot be run -> reason.
    """

    runs: list[Run]
    left_out: Mapping[str, str]


def every_method(model: Any) -> tuple[list[str], dict[str, str]]:
    """All methods with the options that make them work on `model`, baselines first; the others with the reason."""
    names = [*BASELINES, *(name for name in METHODS.names() if name not in BASELINES)]
    found = [workable(model, name) for name in names]
    refused = {capability.spec.name: capability.reason for capability in found if capability.needs is None}
    return [str(capability.spec) for capability in found if capability.needs is not None], refused


def plan(model: Any, methods: Sequence[str], keeps: Sequence[int | float]) -> Comparison:
    """Every one of `methods` at every one of `keeps`; see `Run` for what they mean.

    Raises:
        SpecError: a budget is out of range.
    """
    for keep in keeps:
        Budget(keep)
    runs: list[Run] = [(None, 1.0)]
    left_out = {}
    ruled = [method for method in methods if not _takes_keep(method)]
    wanted: list[tuple[str, int | float | None]] = [
        *((method, keep) for keep in keeps for method in methods if method not in ruled),
        *((method, None) for method in ruled),
    ]
    for method, budget in wanted:
        try:
            wrap(model, configure(method, budget)).unwrap()
            runs.append((method, budget))
        except MMCompressError as error:
            left_out[f"{method} at {report.budget(budget)}"] = str(error)
    return Comparison(runs, left_out)


def measure(
    model: Any, processor: Any, questions: Sequence[Question], images: Images, runs: Sequence[Run], console: Console
) -> list[Result]:
    """`evaluate` with a progress bar, and the table of it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("answering", total=len(questions) * len(runs))
        results = evaluate(
            model,
            processor,
            questions,
            images,
            runs,
            batch_size=BATCH_SIZE,
            progress=lambda answered: progress.advance(task, answered),
        )
    table = report.table(results, questions)
    console.print(table, width=table.width, crop=False, no_wrap=True, overflow="ignore")
    return results


def write(
    out: Path, results: Sequence[Result], questions: Sequence[Question], left_out: Mapping[str, str], console: Console
) -> None:
    """Write `table.md` and `results.json` to the folder `out`, and say so."""
    facts = environment()
    measured = ", ".join(f"{name} {value}" for name, value in facts.items())
    refusals = "".join(f"- left out: {what}: {reason}\n" for what, reason in left_out.items())
    table, record = out / "table.md", out / "results.json"
    table.write_text(f"{report.markdown(results, questions)}{refusals}- {measured}\n", encoding="utf-8")
    facts = {"environment": facts, "batch_size": BATCH_SIZE, "left_out": dict(left_out)}
    record.write_text(json.dumps(facts | as_record(results, questions), indent=1) + "\n", encoding="utf-8")
    for what, reason in left_out.items():
        console.print(f"left out {what}: {reason}", markup=False, highlight=False, soft_wrap=True)
    for path in (table, record):
        console.print(f"wrote {path}", highlight=False)


def as_record(results: Sequence[Result], questions: Sequence[Question]) -> dict[str, Any]:
    """Questions once, and per run its numbers and the answer to every question, in the same order."""
    images = [asked.image for asked in questions]
    runs = []
    for result in results:
        accuracy = clustered_mean(report.scores(result), images)
        runs.append(
            {
                "method": result.method,
                "keep": result.keep,
                "accuracy": accuracy.value,
                "standard_error": accuracy.error,
                "cost": asdict(result.cost),
                "answers": [answer.text for answer in result.answers],
            }
        )
    return {"questions": [asdict(asked) for asked in questions], "runs": runs}


def _takes_keep(methods: str) -> bool:
    card: Any = METHODS.get(configure(methods, None).methods[-1].name)
    return bool(card.info.takes_keep)
