"""The report of evaluations and benchmarks as one page that needs nothing else: no network, no scripts."""

from __future__ import annotations

import base64
from collections.abc import Callable, Collection, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mmcompress.errors import InputError
from mmcompress.evals import report, report_stages
from mmcompress.evals.report_style import METHOD_COLOURS, OTHER_COLOUR, PLAIN_COLOURS, STYLE
from mmcompress.evals.report_svg import Curve, Point, pareto
from mmcompress.evals.suites.base import picture_in

MAX_PANEL_BYTES = 4 * 2**20
SHARE_OF_TOKENS = "visual tokens per LLM layer"
ROWS_SHOWN = 40
"""Of a table; longer ones are folded."""

Record = Mapping[str, Any]


def page(sections: Sequence[str]) -> str:
    """One page of sections about results."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>mmcompress report</title>
<style>{STYLE}</style></head><body>
<h1>What compression costs and saves</h1>
<p class="dim">Retained: a run's metric as a share of the unpruned model's on the same questions, with the 95 % interval
of the same images drawn again for both. Tokens: visual tokens per LLM layer.</p>
{"".join(sections)}
</body></html>
"""


def evaluation(folder: Path, result: Record) -> str:
    """The section about the result of an evaluation, whose pictures are in `folder`.

    Raises:
        InputError: a picture is none of its own, or too large.
    """
    questions = sum(len(suite["questions"]) for suite in result["suites"].values())
    parts = [
        f"<h2>{escape(result['model'])}</h2>",
        f'<p class="dim">{questions} questions of {escape(", ".join(result["suites"]))}; {len(result["runs"])} runs; '
        f"seed {escape(str(result['seed']))}.</p>",
        _charts(result),
        _heat_map(result),
        _stages(result),
        _samples(folder, result),
        *(_suite(result, label) for label in result["suites"]),
        origin(result),
    ]
    return "\n".join(part for part in parts if part)


def origin(result: Record) -> str:
    """The command that made a result, where, and what it had to leave out."""
    facts = {name: value for name, value in result["environment"].items() if name != "command"}
    left_out = result["left_out"]
    listed = f"<details><summary>{len(left_out)} left out</summary>{_facts(left_out, 'long')}</details>"
    command = escape(str(result["environment"]["command"]))
    return f"<h3>Command and environment</h3><pre>{command}</pre>{_facts(facts)}{listed if left_out else ''}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], begin: Collection[int] = ()) -> str:
    """Cells under a head, with a line above the rows that `begin` a group; folded if there are many."""
    titles = "".join(f"<th>{escape(title).replace(chr(10), '<br>')}</th>" for title in head)
    lines = ""
    for number, cells in enumerate(rows):
        kind = ' class="first"' if number in begin else ""
        lines += f"<tr{kind}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
    drawn = f'<div class="scroll"><table><tr>{titles}</tr>{lines}</table></div>'
    return drawn if len(rows) <= ROWS_SHOWN else f"<details><summary>{len(rows)} rows</summary>{drawn}</details>"


def _facts(facts: Mapping[str, Any], kind: str = "short") -> str:
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    return f'<dl class="{kind}">{listed}</dl>'


def _charts(result: Record) -> str:
    if not result["runs"][0].get("retained"):
        return "<p>The unpruned model scores nothing here, so that nothing can be said of what is retained.</p>"
    colours = _colours(result)
    costs: dict[str, Callable[[Record], float]] = {
        "time to the first token, ms per question": _first_token_ms,
        SHARE_OF_TOKENS: lambda run: float(run["share_of_tokens"]),
        "KV cache per question, MB": lambda run: float(run["kv_bytes"]) / 1e6,
    }
    drawn = {label: _curves(result, colours, cost) for label, cost in costs.items()}
    charts = [pareto(curves, label, percent=label == SHARE_OF_TOKENS) for label, curves in drawn.items() if curves]
    named = [(name, colour) for name, colour in colours.items() if colour != OTHER_COLOUR]
    others = len(colours) - len(named)
    shown = [*named, (f"{others} other{'s' if others > 1 else ''}", OTHER_COLOUR)] if others else named
    legend = "".join(f'<span><i style="background: {colour}"></i>{escape(name)}</span>' for name, colour in shown)
    return (
        "<h3>Retained against time, tokens and KV cache, mean over suites</h3>"
        f'<div class="charts">{"".join(charts)}</div><div class="legend">{legend}</div>'
        '<p class="dim">Ringed: no other run retains more at less. Coloured: what retains most, averaged over all '
        "budgets. Bars: 95 % intervals. A point under the pointer says its name.</p>"
    )


def _first_token_ms(run: Record) -> float:
    return 1000 * report_stages.first_token(report_stages.mean_seconds(run))


def _curves(result: Record, colours: Mapping[str, str], cost: Callable[[Record], float]) -> list[Curve]:
    """What runs retain over what they cost, where it was measured."""
    points: dict[str, list[Point]] = {}
    for run in result["runs"]:
        share = run.get("retained")
        if share and cost(run) > 0:
            points.setdefault(report.family(run), []).append(
                Point(cost(run), 100 * share["value"], 100 * (share["margin"] or 0.0), run["label"])
            )
    curves = [Curve(name, colours[name], sorted(of)) for name, of in points.items()]
    return sorted(curves, key=lambda curve: curve.colour != OTHER_COLOUR)


def _colours(result: Record) -> dict[str, str]:
    """Colours for the methods that retain most on average over all budgets, best first; one for all others."""
    shares: dict[str, list[float]] = {}
    for run in result["runs"]:
        shares.setdefault(report.family(run), []).append((run.get("retained") or {"value": 0.0})["value"])
    plain = {name: colour for name, colour in PLAIN_COLOURS.items() if name in shares}
    budgets = max((len(of) for name, of in shares.items() if name not in plain), default=0)
    best = sorted(
        (name for name in shares if name not in plain and len(shares[name]) == budgets),
        key=lambda name: -sum(shares[name]),
    )
    standing_out = plain | dict(zip(best, METHOD_COLOURS, strict=False))
    return standing_out | {name: OTHER_COLOUR for name in shares if name not in standing_out}


def _heat_map(result: Record) -> str:
    """A row per method, a column per suite and budget."""
    runs = result["runs"][1:]
    budgets = list(dict.fromkeys(report.budget(run["keep"]) for run in runs))
    of: dict[str, dict[str, Record]] = {}
    for run in runs:
        of.setdefault(report.family(run), {})[report.budget(run["keep"])] = run
    labels = list(result["suites"])
    groups = [*labels, "mean"] if len(labels) > 1 else labels
    head = "".join(f'<th class="group" colspan="{len(budgets)}">{escape(label)}</th>' for label in groups)
    second = "".join(f"<th>{escape(_heading(budget))}</th>" for budget in budgets) * len(groups)
    lines = []
    for name, by_budget in of.items():
        shares = [
            _share(by_budget.get(budget), label if at < len(labels) else None)
            for at, label in enumerate(groups)
            for budget in budgets
        ]
        lines.append(f"<tr><td>{escape(name)}</td>{''.join(map(_heat, shares))}</tr>")
    return (
        '<h3>Retained by suite and budget, %</h3><div class="scroll"><table class="heat">'
        f"<tr><th></th>{head}</tr><tr><th>method</th>{second}</tr>{''.join(lines)}</table></div>"
    )


def _heading(budget: str) -> str:
    return budget if budget != report.NO_BUDGET else "own rule"


def _share(run: Record | None, label: str | None) -> Record | None:
    """What a run retains in a suite, or over all of them."""
    if run is None:
        return None
    found: Record = run if label is None else run["suites"][label]
    return found.get("retained")


def _heat(share: Record | None) -> str:
    """A cell that is red at half of the unpruned metric or less, green above all of it."""
    if share is None:
        return "<td></td>"
    lost, gained = min(1.0, 2 * (1 - share["value"])), min(1.0, 5 * (share["value"] - 1))
    colour = f"rgb(var(--lost) / {0.75 * lost:.2f})" if lost > 0 else f"rgb(var(--gained) / {0.6 * gained:.2f})"
    ends = report.percent(share) if "low" in share else ""
    return f'<td style="background: {colour}" title="{escape(ends)}">{100 * share["value"]:.1f}</td>'


def _stages(result: Record) -> str:
    """Bars of all runs, those of the middle budget shown."""
    groups = report_stages.by_budget(result)
    if not groups:
        return ""
    shown = list(groups)[(len(groups) - 1) // 2]
    folded = "".join(
        f"<details{' open' if budget == shown else ''}><summary>{escape(_heading(budget))}</summary>"
        f"{report_stages.html(bars)}</details>"
        for budget, bars in groups.items()
    )
    return (
        "<h3>Time by stage and budget</h3>"
        '<p class="dim">Per question, medians, mean over suites; behind each bar: milliseconds to the first token + '
        "decoding. Encoder: with the projector, and as if nothing had been reused.</p>" + folded
    )


def _suite(result: Record, label: str) -> str:
    suite = result["suites"][label]
    title = f"<h3>{escape(label)}: {len(suite['questions'])} questions</h3>"
    problems = "".join(f"<p class='wrong'>{escape(line)}</p>" for line in report.problem_lines(label, suite))
    if not suite["questions"]:
        return title + problems
    head = [f"{name}\n{unit or chr(160)}" for name, unit in report.columns(result, label)]
    budgets = [report.budget_key(run["keep"], run["kv"]) for run in result["runs"]]
    begin = {number for number in range(len(budgets)) if number == 0 or budgets[number] != budgets[number - 1]}
    notes = "".join(f"<p class='dim'>{escape(note)}</p>" for note in report.notes(result, label))
    drawn = table(head, report.rows(result, label), begin)
    return f"{title}{problems}{drawn}<details><summary>What the columns mean</summary>{notes}</details>"


def _samples(folder: Path, result: Record) -> str:
    shown = []
    for sample in result["samples"]:
        suite = result["suites"][sample["suite"]]
        number = next(at for at, question in enumerate(suite["questions"]) if question["id"] == sample["question"])
        question = suite["questions"][number]
        figures = [_figure(folder, result, sample["suite"], number, panel) for panel in sample["panels"]]
        answers = ", ".join(dict.fromkeys(question["answers"]))
        shown.append(
            f"<p><b>{escape(question['prompt'])}</b><br><span class='dim'>{escape(sample['suite'])}; right: "
            f"{escape(answers)}</span></p><div class='panels'>{''.join(figures)}</div>"
        )
    if not shown:
        return ""
    note = (
        "Questions that the unpruned model answers and on which runs differ most; dropped patches are dimmed. The "
        "answer of the run, and that of the unpruned model."
    )
    return f"<h3>What was kept, and what was answered</h3><p class='dim'>{note}</p>{''.join(shown)}"


def _figure(folder: Path, result: Record, label: str, number: int, panel: Record) -> str:
    run, unpruned = result["runs"][panel["run"]], result["runs"][0]
    note = f", {panel['note']}" if panel.get("note") else ""
    before = "" if run is unpruned else f"<br><span class='dim'>unpruned:</span> {_answer(unpruned, label, number)}"
    caption = f"{escape(run['label'] + note)}<br>{_answer(run, label, number)}{before}"
    return f"<figure>{_image(folder, panel['file'])}<figcaption>{caption}</figcaption></figure>"


def _answer(run: Record, label: str, number: int) -> str:
    found = run["suites"][label]
    verdict = "right" if found["scores"][number] >= 0.5 else "wrong"
    mark = "✓" if verdict == "right" else "✗"
    return f"<b class='{verdict}'>{mark} {escape(found['answers'][number]) or '(nothing)'}</b>"


def _image(folder: Path, file: str) -> str:
    path = picture_in(folder, file).path
    assert path is not None
    try:
        data = path.read_bytes()
    except OSError:
        return f"<p class='dim'>{escape(file)} is missing</p>"
    if len(data) > MAX_PANEL_BYTES:
        raise InputError(f"{path} is too large for a picture of a report.")
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'
