"""The report of a benchmark: the stages of every row, and what each gains."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from mmcompress.evals import report, report_html, report_stages

_GAINS = ("TTFT x", "LLM x", "limit x")
HEAD = ("run", "tokens/layer", "TTFT ms", "±", "TPOT ms", "±", *_GAINS, "pays from", "KV MB", "peak MB")
NOTES = (
    "x: time of the unpruned model over that of the run; LLM: of the prefill; limit: what the saved FLOPs allow. "
    "Medians; ±: half of what lies between the quartiles. Pays from: the visual tokens of a prompt from which on "
    "choosing costs less than the prefill gains."
)

Record = Mapping[str, Any]


def html(result: Record) -> str:
    """The section about a benchmark."""
    terms = f"{result['layers']} LLM layers, {result['dtype']}, {result['repeats']} runs"
    parts = [
        f"<h2>{escape(result['model'])}: benchmark</h2>",
        f'<p class="dim">{escape(terms)}. Behind each bar: milliseconds to the first token, and of each token behind '
        "it.</p>",
    ]
    for setting, rows in _settings(result).items():
        bars = [report_stages.Bar(_name(row), row["seconds"], _said(row)) for row in rows]
        table = report_html.table(HEAD, [_cells(row) for row in rows])
        parts += [f"<h3>{escape(setting)}</h3>", report_stages.html(bars), table]
    return "\n".join([*parts, f'<p class="dim">{escape(NOTES)}</p>', report_html.origin(result)])


def markdown(result: Record) -> str:
    """The gains in Markdown."""
    parts = []
    for setting, rows in _settings(result).items():
        marks = ["---", *["---:"] * (len(HEAD) - 1)]
        parts += [f"## {setting}", ""]
        parts += [f"| {' | '.join(cells)} |" for cells in (HEAD, marks, *map(_cells, rows))]
        parts.append("")
    left_out = [f"- left out: {what}: {why}" for what, why in result["left_out"].items()]
    facts = ", ".join(f"{name} {value}" for name, value in result["environment"].items())
    return "\n".join([*parts, f"- {NOTES}", *left_out, f"- {facts}", ""])


def lines(result: Record) -> list[dict[str, Any]]:
    """Every row as a line of a CSV."""
    return [
        {
            "model": result["model"],
            "method": row["methods"] or "unpruned",
            "keep": row["keep"],
            "kv": row["kv"],
            "image": "x".join(map(str, row["image"])),
            "batch": row["batch"],
            "tokens": row["tokens"],
            "tokens_per_layer": row["in_llm"],
            "kv_bytes": row["kv_bytes"],
            "ttft_seconds": row["ttft"],
            "tpot_seconds": row["tpot"],
            **{f"{stage}_seconds": seconds for stage, seconds in row["seconds"].items()},
        }
        for row in result["rows"]
    ]


def _settings(result: Record) -> dict[str, list[Record]]:
    """Rows that compare: of one picture and batch."""
    found: dict[str, list[Record]] = {}
    for row in result["rows"]:
        found.setdefault(f"Pictures of {'x'.join(map(str, row['image']))}, batch of {row['batch']}", []).append(row)
    return found


def _name(row: Record) -> str:
    name = report.family({"method": row["methods"], "kv": row["kv"]})
    return name if row["methods"] is None else f"{name} at {report.budget(row['keep'])}"


def _said(row: Record) -> str:
    return f"{1000 * row['ttft']:.1f} ms, {1000 * row['tpot']:.1f} a token"


def _cells(row: Record) -> list[str]:
    times = [row["ttft"], row["ttft_spread"], row["tpot"], row["tpot_spread"]]
    unpruned = row["methods"] is None and row["kv"] is None
    pays = "" if unpruned else "never" if row["pays_from"] is None else f"{row['pays_from']:.0f}"
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
    return [
        _name(row),
        f"{row['in_llm']:.0f} of {row['tokens']}",
        *(f"{1000 * seconds:.1f}" for seconds in times),
        *(f"{row[ratio]:.2f}" for ratio in ("ttft_ratio", "prefill_ratio", "flop_ratio")),
        pays,
        f"{row['kv_bytes'] / 1e6:.2f}",
        peak,
    ]
