"""The table of an evaluation: one row per run, as a rich table or in Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import groupby

from rich.box import SIMPLE
from rich.table import Table

from mmcompress.evals.micro import Question
from mmcompress.evals.runner import Result
from mmcompress.evals.statistics import Estimate, clustered_mean, paired_difference

COLUMNS = (
    ("method", ""),
    ("keep", ""),
    ("accuracy", "±95 %"),
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
)
"""Heading and unit of every column."""

WIDTH = 110
"""Characters the table is wide, unless names of methods are longer than `_NAME`."""

_NAME = 24

NOTES = (
    "accuracy: exact match in %, 95 % interval clustered by image; vs random: points above random tokens at the same "
    "keep on the same questions, clustered standard error; retained: share of the unpruned accuracy.",
    "keep: visual tokens per LLM layer on average, as a share, or -- where a method's own rule decides; methods joined "
    "by + share the work.",
    "random keeps one fixed subset for all images; the errors do not contain the luck of that subset.",
    "tokens: visual tokens that enter the LLM, and their mean over its layers; GFLOP, kB and ms are per question. "
    "Times are medians over batches on this machine, none saved by reusing encoded images.",
)


def rows(results: Sequence[Result], questions: Sequence[Question]) -> list[list[str]]:
    """The cells of the table, one list per run in the order of `results`, in the order of `COLUMNS`."""
    images = [asked.image for asked in questions]
    unpruned = next((scores(result) for result in results if result.method is None), None)
    random = {result.keep: scores(result) for result in results if result.method == "random"}
    return [_row(result, questions, images, unpruned, random.get(result.keep)) for result in results]


def table(results: Sequence[Result], questions: Sequence[Question]) -> Table:
    """The rows as a table, budgets apart."""
    width = WIDTH + max(0, max(len(result.method or "") for result in results) - _NAME)
    notes = "\n".join(textwrap.fill(note, width) for note in NOTES)
    drawn = Table(box=SIMPLE, padding=0, width=width, caption=notes, caption_justify="left", caption_style="dim")
    for number, (heading, unit) in enumerate(COLUMNS):
        drawn.add_column(f"{heading}\n{unit}", justify="right" if number else "left", no_wrap=True)
    numbered = zip(results, rows(results, questions), strict=True)
    for _, same_budget in groupby(numbered, key=lambda entry: (entry[0].method is None, entry[0].keep)):
        for _, cells in same_budget:
            drawn.add_row(*cells)
        drawn.add_section()
    return drawn


def markdown(results: Sequence[Result], questions: Sequence[Question]) -> str:
    """The same rows as a Markdown table, notes included."""
    headings = [f"{heading} ({unit})" if unit else heading for heading, unit in COLUMNS]
    marks = ["---", *["---:"] * (len(headings) - 1)]
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, marks, *rows(results, questions))]
    return "\n".join([*lines, "", *(f"- {note}" for note in NOTES), ""])


def scores(result: Result) -> list[float]:
    """1.0 for every right answer, 0.0 for every other, in the order of the questions."""
    return [float(answer.correct) for answer in result.answers]


def budget(keep: int | float | None) -> str:
    """The budget of a run, for people."""
    if keep is None:
        return "--"
    return f"{100 * keep:g}%" if isinstance(keep, float) else str(keep)


def _row(
    result: Result,
    questions: Sequence[Question],
    images: Sequence[str],
    unpruned: Sequence[float] | None,
    random: Sequence[float] | None,
) -> list[str]:
    right, cost = scores(result), result.cost
    accuracy = clustered_mean(right, images)
    against = None if random is None or result.method in (None, "random") else paired_difference(right, random, images)
    invalid = sum(not answer.valid for answer in result.answers) / len(result.answers)
    return [
        result.method or "unpruned",
        budget(result.keep),
        f"{100 * accuracy.value:.1f} ±{100 * accuracy.margin:.1f}",
        "" if against is None else _points(against),
        f"{100 * invalid:.1f}",
        f"{100 * accuracy.value / (sum(unpruned) / len(unpruned)):.1f}" if unpruned and any(unpruned) else "",
        f"{cost.kept:.0f}",
        f"{cost.tokens_per_layer:.0f}",
        f"{cost.prefill_flops / 1e9:.3f}",
        f"{cost.kv_bytes / 1e3:.0f}",
        *(f"{1000 * seconds:.2f}" for seconds in vars(cost.seconds).values()),
    ]


def _points(difference: Estimate) -> str:
    return f"{100 * difference.value:+.1f} ±{100 * difference.error:.1f}"
