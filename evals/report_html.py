"""The report of evaluations as one page that needs nothing else: no network, no scripts, pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mmcompress.errors import InputError
from mmcompress.evals import report
from mmcompress.evals.record import load
from mmcompress.evals.report_svg import Curve, Point, pareto
from mmcompress.evals.suites.base import picture_in

PALETTE = ("#0b6e99", "#d9480f", "#2b8a3e", "#9c36b5", "#c92a2a", "#5f3dc4", "#b08900", "#087f5b")
GREY, DARK = "#b8bec6", "#6b7280"
MAX_PANEL_BYTES = 4 * 2**20

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; margin: 0 auto; max-width: 1080px;
  padding: 24px; }
h1 { font-size: 26px; margin: 0 0 4px } h2 { font-size: 20px; margin: 40px 0 8px; border-top: 1px solid #e4e7eb;
  padding-top: 20px } h3 { font-size: 16px; margin: 28px 0 8px }
p { margin: 6px 0; max-width: 75ch } .dim { color: #616e7c } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: 3px 10px; text-align: right; white-space: nowrap } th { color: #616e7c; font-weight: 600 }
th:first-child, td:first-child { text-align: left } tr.first td { border-top: 1px solid #e4e7eb }
.heat td { min-width: 34px } th.group { text-align: center }
pre { background: #f5f7fa; padding: 10px 12px; overflow-x: auto; font-size: 13px }
.charts { display: flex; flex-wrap: wrap; gap: 20px } svg { max-width: 100%; height: auto }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px; margin: 6px 0 }
.legend i { display: inline-block; width: 18px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: 3px }
.panels { display: flex; flex-wrap: wrap; gap: 14px } figure { margin: 0; width: 240px; font-size: 13px }
figure img { width: 100%; display: block } figcaption { overflow-wrap: anywhere }
.right { color: #2b8a3e } .wrong { color: #c92a2a }
details { margin: 8px 0 } summary { cursor: pointer; color: #334e68 } dl { display: grid; grid-template-columns:
  max-content auto; gap: 2px 16px; font-size: 13px } dt { color: #616e7c } dd { margin: 0; overflow-wrap: anywhere }
"""

Record = Mapping[str, Any]


def page(folders: Sequence[Path]) -> str:
    """One page about the results in `folders`, which are folders of `mmcompress eval` or result files.

    Raises:
        InputError: a result is missing or none.
        SpecError: another format of results.
    """
    sections = [_section(path if path.is_dir() else path.parent, load(path)) for path in folders]
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>mmcompress report</title>
<style>{_STYLE}</style></head><body>
<h1>What compression costs and saves</h1>
<p class="dim">Retained: a run's metric as a share of the unpruned model's on the same questions, with the 95 % interval
of the same images drawn again for both. Tokens: visual tokens per LLM layer.</p>
{"".join(sections)}
</body></html>
"""


def _section(folder: Path, result: Record) -> str:
    questions = sum(len(suite["questions"]) for suite in result["suites"].values())
    colours = _colours(result)
    parts = [
        f"<h2>{escape(result['model'])}</h2>",
        f'<p class="dim">{questions} questions of {escape(", ".join(result["suites"]))}; {len(result["runs"])} runs; '
        f"seed {result['seed']}.</p>",
        _charts(result, colours),
        _heat_map(result),
        *(_suite(result, label) for label in result["suites"]),
        _samples(folder, result),
        _origin(result),
    ]
    return "\n".join(part for part in parts if part)


def _charts(result: Record, colours: Mapping[str, str]) -> str:
    base = result["runs"][0]
    by_tokens, by_bytes = (
        _curves(result, colours, x) for x in (lambda run: run["share_of_tokens"], lambda run: run["kv_bytes"] / 1e6)
    )
    if not base.get("retained"):
        return "<p>The unpruned model scores nothing here, so that nothing can be said of what is retained.</p>"
    names = {curve.name: curve.colour for curve in by_tokens}
    others = list(names.values()).count(GREY)
    shown = [(name, colour) for name, colour in names.items() if colour != GREY]
    shown += [(f"{others} others", GREY)] if others else []
    legend = "".join(f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in shown)
    charts = pareto(by_tokens, "visual tokens per LLM layer, share", percent=True) + pareto(
        by_bytes, "KV cache per question, MB"
    )
    return (
        "<h3>Retained against tokens and KV cache, mean over suites</h3>"
        f'<div class="charts">{charts}</div><div class="legend">{legend}</div>'
        '<p class="dim">Ringed: no other run retains more at less. Coloured: what retains most, averaged over all '
        "budgets. Bars: 95 % intervals. A point under the pointer says its name.</p>"
    )


def _curves(result: Record, colours: Mapping[str, str], x: Any) -> list[Curve]:
    points: dict[str, list[Point]] = {}
    for run in result["runs"]:
        if run.get("retained"):
            share = run["retained"]
            points.setdefault(_family(run), []).append(
                Point(x(run), 100 * share["value"], 100 * (share["margin"] or 0.0), run["label"])
            )
    return [Curve(name, colours[name], sorted(of)) for name, of in points.items()]


def _family(run: Record) -> str:
    """What makes a curve: runs that differ in their budget alone."""
    name = run["method"] or "unpruned"
    return f"{name}, KV {run['kv']}" if run["kv"] else name


def _colours(result: Record) -> dict[str, str]:
    """The palette for the methods that retain most on average over all budgets, greys for all others."""
    shares: dict[str, list[float]] = {}
    for run in result["runs"]:
        shares.setdefault(_family(run), []).append((run.get("retained") or {"value": 0.0})["value"])
    plain = {"unpruned": "#1f2933", "random": DARK, "uniform": "#9aa5b1"}
    budgets = max((len(of) for name, of in shares.items() if name not in plain), default=0)
    best = sorted(
        (name for name in shares if name not in plain and len(shares[name]) == budgets),
        key=lambda name: -sum(shares[name]),
    )
    return {name: GREY for name in shares} | dict(zip(best, PALETTE, strict=False)) | plain


def _heat_map(result: Record) -> str:
    """A row per method, a column per suite and budget."""
    runs = result["runs"][1:]
    budgets = list(dict.fromkeys(report.budget(run["keep"]) for run in runs))
    of: dict[str, dict[str, Record]] = {}
    for run in runs:
        of.setdefault(_family(run), {})[report.budget(run["keep"])] = run
    labels = list(result["suites"])
    groups = [*labels, "mean"] if len(labels) > 1 else labels
    head = "".join(f'<th class="group" colspan="{len(budgets)}">{escape(label)}</th>' for label in groups)
    second = "".join(f"<th>{escape(budget)}</th>" for budget in budgets) * len(groups)
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


def _share(run: Record | None, label: str | None) -> Record | None:
    """What a run retains in a suite, or over all of them."""
    if run is None:
        return None
    found: Record = run if label is None else run["suites"][label]
    return found.get("retained")


def _heat(share: Record | None) -> str:
    """A cell from red at half of the unpruned metric over white to green above it."""
    if share is None:
        return "<td></td>"
    lost = max(0.0, min(1.0, 2 * (1 - share["value"])))
    gained = max(0.0, min(1.0, 5 * (share["value"] - 1)))
    colour = f"rgb({255 - 60 * gained:.0f},{255 - 130 * lost - 15 * gained:.0f},{255 - 165 * lost - 60 * gained:.0f})"
    ends = report.percent(share) if "low" in share else ""
    return f'<td style="background:{colour}" title="{escape(ends)}">{100 * share["value"]:.1f}</td>'


def _suite(result: Record, label: str) -> str:
    suite = result["suites"][label]
    title = f"<h3>{escape(label)}: {len(suite['questions'])} questions</h3>"
    problems = "".join(f"<p class='wrong'>{escape(line)}</p>" for line in report.problem_lines(label, suite))
    if not suite["questions"]:
        return title + problems
    head = "".join(
        f"<th>{escape(name)}<br>{escape(unit) or '&nbsp;'}</th>" for name, unit in report.columns(result, label)
    )
    lines, before = [], None
    for run, cells in zip(result["runs"], report.rows(result, label), strict=True):
        first = ' class="first"' if (run["keep"], run["kv"]) != before else ""
        before = (run["keep"], run["kv"])
        lines.append(f"<tr{first}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    notes = "".join(f"<p class='dim'>{escape(note)}</p>" for note in report.notes(result, label))
    table = f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'
    return f"{title}{problems}{table}<details><summary>What the columns mean</summary>{notes}</details>"


def _samples(folder: Path, result: Record) -> str:
    shown = []
    for sample in result["samples"]:
        suite = result["suites"][sample["suite"]]
        number = next(at for at, question in enumerate(suite["questions"]) if question["id"] == sample["question"])
        question = suite["questions"][number]
        figures = [_figure(folder, result["runs"][panel["run"]], sample["suite"], number, panel["file"])
                   for panel in sample["panels"]]  # fmt: skip
        answers = ", ".join(dict.fromkeys(question["answers"]))
        shown.append(
            f"<p><b>{escape(question['prompt'])}</b><br><span class='dim'>{escape(sample['suite'])}; right: "
            f"{escape(answers)}</span></p><div class='panels'>{''.join(figures)}</div>"
        )
    if not shown:
        return ""
    note = "Questions that the unpruned model answers and on which runs differ most; dropped patches are dimmed."
    return f"<h3>What was kept, and what was answered</h3><p class='dim'>{note}</p>{''.join(shown)}"


def _figure(folder: Path, run: Record, label: str, number: int, file: str) -> str:
    found = run["suites"][label]
    verdict = "right" if found["scores"][number] >= 0.5 else "wrong"
    caption = f"{escape(run['label'])}: <b class='{verdict}'>{escape(found['answers'][number]) or '(nothing)'}</b>"
    return f"<figure>{_image(folder, file)}<figcaption>{caption}</figcaption></figure>"


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


def _origin(result: Record) -> str:
    facts = {name: value for name, value in result["environment"].items() if name != "command"}
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    left_out = "".join(f"<dt>{escape(what)}</dt><dd>{escape(why)}</dd>" for what, why in result["left_out"].items())
    skipped = f"<details><summary>Runs left out</summary><dl>{left_out}</dl></details>" if left_out else ""
    command = escape(str(result["environment"]["command"]))
    return f"<h3>Environment and command</h3><pre>{command}</pre><dl>{listed}</dl>{skipped}"
