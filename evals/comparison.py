"""Methods beside each other on one model: what can be run, running it, and writing down what came of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import transformers
from rich.console import Console

import mmcompress
from mmcompress.budget import Budget
from mmcompress.errors import InputError, MMCompressError, UnsupportedError
from mmcompress.evals import record, report, samples
from mmcompress.evals.answers import Answers, Key, write_whole
from mmcompress.evals.backend_hf import TRANSFORMERS
from mmcompress.evals.backends import Backend, Terms, prepare
from mmcompress.evals.environment import environment
from mmcompress.evals.loading import weights_fingerprint
from mmcompress.evals.record import Asked, Record
from mmcompress.evals.runner import Run, configure
from mmcompress.evals.suites.base import Problem, Question, Scorer, content_hash, draw, fingerprint, picture_contents
from mmcompress.registry import METHODS

BASELINES = ("random", "uniform")


@dataclass(frozen=True)
class Comparison:
    """Runs that a model allows, and why it allows no others.

    Args:
        runs: the unpruned model, then every method at every budget, those without a budget at the end; then all of
            these with every KV policy.
        left_out: what cannot be run -> reason.
    """

    runs: list[Run]
    left_out: Mapping[str, str]


class Readable(Protocol):
    """What questions are read from: a suite, or a task of lmms-eval."""

    @property
    def scorer(self) -> Scorer:
        """How answers are judged."""

    @property
    def max_new_tokens(self) -> int:
        """The longest answer."""

    def read(self) -> tuple[list[Question], list[Problem]]:
        """All questions, and the rows that are none."""


def every_method(model: Any, backend: Backend = TRANSFORMERS) -> tuple[list[str], dict[str, str]]:
    """All methods with the options that make them work on `model`, baselines first; the others with the reason."""
    names = [*BASELINES, *(name for name in METHODS.names() if name not in BASELINES)]
    found = [backend.capability(model, name) for name in names]
    refused = {capability.spec.name: capability.reason for capability in found if capability.needs is None}
    return [str(capability.spec) for capability in found if capability.needs is not None], refused


def plan(
    model: Any,
    methods: Sequence[str],
    keeps: Sequence[int | float],
    policies: Sequence[str] = (),
    backend: Backend = TRANSFORMERS,
) -> Comparison:
    """Every one of `methods` at every one of `keeps`, without and with every KV policy; see `Run` for what they mean.

    Raises:
        SpecError: a budget is out of range.
    """
    for keep in keeps:
        Budget(keep)
    ruled = [method for method in methods if not _takes_keep(method)]
    visual = [
        Run(None, 1.0),
        *(Run(method, keep) for keep in keeps for method in methods if method not in ruled),
        *(Run(method, None) for method in ruled),
    ]
    wanted = [run._replace(kv=policy) for policy in (None, *policies) for run in visual]
    runs, left_out = wanted[:1], {}
    for run in wanted[1:]:
        try:
            backend.check(model, configure(*run))
            runs.append(run)
        except MMCompressError as error:
            left_out[run.label] = str(error)
    return Comparison(runs, left_out)


def read(label: str, suite: Readable, terms: Terms) -> Asked:
    """The questions to ask of a suite.

    Raises:
        SpecError: its files are absent, or the limit is not positive.
        InputError: no question can be read.
        UnsupportedError: a package that its scorer needs is missing.
    """
    if suite.scorer.require is not None:
        suite.scorer.require()
    questions, problems = suite.read()
    drawn = draw(questions, terms.limit, terms.seed)
    return Asked(label, suite.scorer, suite.max_new_tokens, drawn, problems)


def compare(
    model: Any,
    processor: Any,
    suites: Sequence[Asked],
    chosen: Comparison,
    terms: Terms,
    out: Path,
    console: Console,
    backend: Backend = TRANSFORMERS,
    command: str = "eval",
) -> Record | None:
    """Ask what the folder `out` has no answer to yet, and write `results.json` and `table.md` there.

    Of several processes the first one writes the results, the others return None. The `backend` answers; `model`
    tells what runs are possible, what they cost and what they keep of samples. Different commands do not share `out`.

    Raises:
        SpecError: `out` holds answers given under other conditions, or a run is malformed.
        UnsupportedError: a run is not possible on this model.
        InputError: not one question can be asked.
        OSError: `out` cannot be written to, or a file that an option names cannot be read; what was answered stays.
    """
    if not processor.chat_template:
        raise UnsupportedError("the model's processor has no chat template, so its prompt format is not known.")
    number, wait = terms.processes.number, terms.processes.wait
    conditions = {"command": command} | _conditions(model, suites, chosen.runs, terms) | backend.conditions
    if number == 0:
        Answers(out, conditions).close()
    wait()
    with Answers(out, conditions, number) as answers:
        backend.ask_all(model, processor, suites, chosen.runs, terms, answers, console)
        wait()
        if number > 0:
            return None
        answers.refresh()
    suites = [_without_unanswered(model, processor, asked, answers, chosen.runs) for asked in suites]
    result = as_record(suites, answers, chosen, terms, backend.facts(model))
    result["samples"] = samples.save(samples.samples(model, processor, suites, result), out)
    write(out, result, console)
    return result


def as_record(
    suites: Sequence[Asked], answers: Answers, chosen: Comparison, terms: Terms, device: dict[str, Any]
) -> Record:
    """The result of an evaluation on `device`; see `mmcompress.evals.record`.

    Raises:
        InputError: no question has an answer.
    """
    suite_records: Record = {}
    by_run: list[Record] = [{} for _ in chosen.runs]
    for asked in suites:
        suite_records[asked.label], runs = record.suite_record(asked, answers, chosen.runs, terms.seed)
        for of_run, of_suite in zip(by_run, runs, strict=True):
            of_run[asked.label] = of_suite
    if not any(suite["questions"] for suite in suite_records.values()):
        raise InputError(f"not one question could be asked; the first problem: {suites[0].problems[0].reason}")
    means = record.overall(by_run)
    return {
        "model": terms.model,
        "seed": terms.seed,
        "limit": terms.limit,
        "batch_size": terms.batch_size,
        "environment": environment() | device | {"processes": terms.processes.count},
        "left_out": dict(chosen.left_out),
        "suites": suite_records,
        "runs": [
            {**record.run_record(run), **mean, "suites": of_run}
            for run, mean, of_run in zip(chosen.runs, means, by_run, strict=True)
        ],
    }


def write(out: Path, result: Record, console: Console) -> None:
    """Print the tables of a result, write `table.md` and `results.json` to the folder `out`, and say so."""
    for label, suite in result["suites"].items():
        if suite["questions"]:
            table = report.table(result, label)
            console.print(table, width=table.width, crop=False, no_wrap=True, overflow="ignore")
    for what, reason in result["left_out"].items():
        console.print(f"left out {what}: {reason}", markup=False, highlight=False, soft_wrap=True)
    for label, suite in result["suites"].items():
        for line in report.problem_lines(label, suite):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    tables, results = out / "table.md", out / "results.json"
    write_whole(tables, report.markdown(result))
    record.save(result, results)
    for path in (tables, results):
        console.print(f"wrote {path}", highlight=False)


def _without_unanswered(model: Any, processor: Any, asked: Asked, answers: Answers, runs: Sequence[Run]) -> Asked:
    """`asked` with the problem of every question that not all runs have answered."""
    unanswered = [
        question
        for question in asked.questions
        if any(Key.of(asked.label, question.id, run) not in answers for run in runs)
    ]
    found = [problem for question in unanswered for problem in prepare(model, processor, [question])[2]]
    return replace(asked, problems=[*asked.problems, *found])


def _conditions(model: Any, suites: Sequence[Asked], runs: Sequence[Run], terms: Terms) -> dict[str, Any]:
    """What answers depend on."""
    return {
        "model": terms.model,
        "revision": getattr(model.config, "_commit_hash", None),
        "weights": weights_fingerprint(model),
        "dtype": str(model.dtype),
        "seed": terms.seed,
        "batch_size": terms.batch_size,
        "mmcompress": mmcompress.__version__,
        "transformers": transformers.__version__,
        **{f"questions of {asked.label}": fingerprint(asked.questions) for asked in suites},
        # One by one, so that a picture that was missing can be put in its place.
        **{
            f"picture {name} of {asked.label}": content
            for asked in suites
            for name, content in picture_contents(asked.questions).items()
        },
        **{f"content of {path}": _content(Path(path)) for path in _files(runs)},
    }


def _files(runs: Sequence[Run]) -> list[str]:
    """Files and folders that options of `runs` name."""
    specs = [spec for config in (configure(*run) for run in runs) for spec in (*config.methods, *config.kv)]
    values = [value for spec in specs for value in spec.options.values() if isinstance(value, str)]
    return [value for value in dict.fromkeys(values) if os.path.exists(value)]


def _content(path: Path) -> str:
    """Equal for equal files, or for folders of equal files."""
    if not path.is_dir():
        return content_hash(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return content_hash(os.fsencode("\n".join(f"{content_hash(file)} {file.relative_to(path)}" for file in files)))


def _takes_keep(methods: str) -> bool:
    card: Any = METHODS.get(configure(methods, None).methods[-1].name)
    return bool(card.info.takes_keep)
