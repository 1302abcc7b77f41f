"""The tables of an evaluation: one row per run, for a terminal, in Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

WIDTH = 121
"""Characters the table is wide, unless names of methods are longer than `_NAME`."""

_NAME = 24
PROBLEMS_SHOWN = 5
NO_BUDGET = "--"

NOTES = (
    "{metric}: 95 % interval; vs random: points above random tokens at the same keep on the same questions, with the "
    "standard error; retained: share of the unpruned model's, 95 % interval. All errors are of images drawn again, "
    "{resamples} times, the same for all runs. invalid: {invalid}.",
    "keep: visual tokens per LLM layer on average, as a share, or -- where a method's own rule decides; methods joined "
    "by + share the work.",
    "random keeps one fixed subset for all images of a size; the errors do not contain the luck of that subset.",
    "tokens: visual tokens that enter the LLM, and their mean over its layers; GFLOP, kB and ms are per question. "
    "Times are medians over questions on this machine, none saved by reusing encoded images.",
)
KV_NOTE = (
    "KV under a policy: what the cache holds after the answer, padding included; in vLLM what the policy leaves of the "
    "prompt, or all of it if it evicts nothing. Otherwise after the prompt."
)

Record = Mapping[str, Any]


def columns(result: Record, label: str) -> list[tuple[str, str]]:
    """Heading and unit of every column of the table of suite `label`."""
    suite = result["suites"][label]
    unit = "±95 %" if suite["unit"] == 100 else "±95 %, points"
    policies = [("KV policy", "")] if any(run["kv"] for run in result["runs"]) else []
    return [
        ("method", ""),
        *policies,
        ("keep", ""),
        (suite["metric"], unit),
        ("vs random", "±SE"),
        ("invalid", "%"),
        ("retained", "%"),
        ("tokens", "/image"),
        ("tokens", "/layer"),
        ("prefill", "GFLOP"),
        ("KV", "kB"),
        ("encoder", "ms"),
        ("select", "ms"),
        ("prefill", "ms"),
        ("decode", "ms"),
    ]


def rows(result: Record, label: str) -> list[list[str]]:
    """The cells of the table of suite `label`, one list per run, in the order of `columns`."""
    policies = any(run["kv"] for run in result["runs"])
    return [_row(run, result["suites"][label], run["suites"][label], policies) for run in result["runs"]]


def notes(result: Record, label: str) -> list[str]:
    """What the columns mean."""
    from mmcompress.evals.record import RESAMPLES

    suite = result["suites"][label]
    first = NOTES[0].format(metric=suite["metric"], invalid=suite["invalid"], resamples=RESAMPLES)
    return [first, *NOTES[1:], *([KV_NOTE] if any(run["kv"] for run in result["runs"]) else [])]


def table(result: Record, label: str) -> Table:
    """The rows as a table, budgets apart."""
    names = [run["method"] or "" for run in result["runs"]]
    width = WIDTH + max(0, max(map(len, names)) - _NAME) + max(len(run["kv"] or "") for run in result["runs"])
    caption = "\n".join(textwrap.fill(note, width) for note in notes(result, label))
    title = f"{label}: {len(result['suites'][label]['questions'])} questions"
    drawn = Table(
        box=SIMPLE, padding=0, width=width, title=title, caption=caption, caption_justify="left", caption_style="dim"
    )
    for number, (heading, unit) in enumerate(columns(result, label)):
        drawn.add_column(f"{heading}\n{unit}", justify="right" if number else "left", no_wrap=True)
    numbered = zip(result["runs"], rows(result, label), strict=True)
    for _, alike in groupby(
        numbered, key=lambda entry: (entry[0]["method"] is None, *budget_key(entry[0]["keep"], entry[0]["kv"]))
    ):
        for _, cells in alike:
            drawn.add_row(*cells)
        drawn.add_section()
    return drawn


def markdown(result: Record) -> str:
    """All tables in Markdown, with notes, what was left out, and what made them."""
    lines = []
    for label, suite in result["suites"].items():
        if not suite["questions"]:
            lines += [f"## {label}", "", "No question could be asked.", ""]
            continue
        headings = [f"{heading} ({unit})" if unit else heading for heading, unit in columns(result, label)]
        marks = ["---", *["---:"] * (len(headings) - 1)]
        lines += [f"## {label}: {len(suite['questions'])} questions", ""]
        lines += [f"| {' | '.join(map(_cell, cells))} |" for cells in (headings, marks, *rows(result, label))]
        lines += ["", *(f"- {note}" for note in [*notes(result, label), *problem_lines(label, suite)]), ""]
    facts = {"model": result["model"], "seed": result["seed"], **result["environment"]}
    left_out = [f"- left out: {what}: {reason}" for what, reason in result["left_out"].items()]
    return "\n".join([*lines, *left_out, f"- {', '.join(f'{name} {value}' for name, value in facts.items())}", ""])


def problem_lines(label: str, suite: Record) -> list[str]:
    """How many rows of a suite could not be asked, and the first of them."""
    problems = suite["problems"]
    if not problems:
        return []
    shown = [" ".join(f"{problem['where']}: {problem['reason']}".split()) for problem in problems[:PROBLEMS_SHOWN]]
    more = f", and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
    return [f"{label}: {len(problems)} rows could not be asked: {'; '.join(shown)}{more}"]


def lines(result: Record) -> list[dict[str, Any]]:
    """Every run of every suite as a line of a CSV, numbers as they are."""
    found = []
    for label, suite in result["suites"].items():
        for run in result["runs"]:
            of_suite = run["suites"][label]
            if not of_suite:
                continue
            cost, retained, against = of_suite["cost"], of_suite["retained"] or {}, of_suite["versus_random"] or {}
            found.append(
                {
                    "model": result["model"],
                    "suite": label,
                    "questions": len(suite["questions"]),
                    "problems": len(suite["problems"]),
                    "method": run["method"] or "unpruned",
                    "keep": run["keep"],
                    "kv": run["kv"],
                    "metric": suite["metric"],
                    "value": of_suite["metrics"][suite["metric"]],
                    "margin": of_suite["margin"],
                    "versus_random": against.get("value"),
                    "versus_random_error": against.get("error"),
                    "retained": retained.get("value"),
                    "retained_low": retained.get("low"),
                    "retained_high": retained.get("high"),
                    "invalid": of_suite["invalid"],
                    **{name: cost[name] for name in ("tokens", "kept", "tokens_per_layer")},
                    "prefill_flops": cost["prefill_flops"],
                    "kv_bytes": cost["kv_bytes"],
                    **{f"{stage}_seconds": seconds for stage, seconds in cost["seconds"].items()},
                    **{f"metric: {name}": value for name, value in of_suite["metrics"].items()},
                    **{f"category: {name}": score for name, score in of_suite["categories"].items()},
                }
            )
    return found


def as_csv(lines: Sequence[Record]) -> str:
    """Lines under the names of all their cells."""
    file = io.StringIO()
    names = dict.fromkeys(name for line in lines for name in line)
    writer = csv.DictWriter(file, list(names), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def family(run: Record) -> str:
    """What runs have in common that differ in their budget alone."""
    name = run["method"] or "unpruned"
    return f"{name}, KV {run['kv']}" if run["kv"] else str(name)


def budget(keep: int | float | None) -> str:
    """The budget of a run, for people."""
    if keep is None:
        return NO_BUDGET
    return f"{100 * keep:g}%" if isinstance(keep, float) else str(keep)


def budget_key(keep: int | float | None, kv: str | None) -> tuple[str, str | None]:
    """Equal for runs of the same budget and KV policy; budgets as written, for 1 and 1.0 are different ones."""
    return repr(keep), kv


def percent(share: Record | None) -> str:
    """A retained share with its interval, for people."""
    if share is None:
        return ""
    known = share["low"] is not None and share["low"] < share["high"]
    ends = f" [{100 * share['low']:.0f}, {100 * share['high']:.0f}]" if known else ""
    return f"{100 * share['value']:.1f}{ends}"


def _row(run: Record, suite: Record, found: Record, policies: bool) -> list[str]:
    if not found:
        return [run["method"] or "unpruned", *[""] * (13 + policies)]
    cost, unit, against = found["cost"], suite["unit"], found["versus_random"]
    return [
        run["method"] or "unpruned",
        *([run["kv"] or ""] if policies else []),
        budget(run["keep"]),
        f"{unit * found['metrics'][suite['metric']]:.1f}{_error(unit, found['margin'])}",
        "" if against is None else f"{unit * against['value']:+.1f}{_error(unit, against['error'])}",
        f"{100 * found['invalid']:.1f}",
        percent(found["retained"]),
        f"{cost['kept']:.0f}",
        f"{cost['tokens_per_layer']:.0f}",
        f"{cost['prefill_flops'] / 1e9:.3f}",
        f"{cost['kv_bytes'] / 1e3:.0f}",
        *(f"{1000 * seconds:.2f}" for seconds in cost["seconds"].values()),
    ]


def _error(unit: float, error: float | None) -> str:
    return "" if error is None else f" ±{unit * error:.1f}"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
