"""Stage bars: where the time of a run goes, whoever measured it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from mmcompress.evals import report

COLOURS = {
    "encoder": "var(--encoder)",
    "taps": "var(--taps)",
    "selection": "var(--selection)",
    "projector": "var(--projector)",
    "prefill": "var(--prefill)",
    "other": "var(--rest)",
    "decode": "var(--decode)",
}

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Bar:
    """A run, its seconds by stage in their order, and what is said behind it."""

    name: str
    seconds: Mapping[str, float]
    said: str


def first_token(seconds: Mapping[str, float]) -> float:
    """Seconds to the first token of stages that an evaluation timed."""
    return sum(value for stage, value in seconds.items() if stage != "decode")


def mean_seconds(run: Record) -> dict[str, float]:
    """Seconds by stage of a run of an evaluation, mean over its suites."""
    by_suite = [found["cost"]["seconds"] for found in run["suites"].values() if found]
    return {stage: sum(one[stage] for one in by_suite) / len(by_suite) for stage in (by_suite[0] if by_suite else ())}


def by_budget(result: Record) -> dict[str, list[Bar]]:
    """The runs of an evaluation by their budget, the unpruned model first in each."""
    unpruned, *others = result["runs"]
    groups: dict[str, list[Bar]] = {}
    for run in others:
        seconds = mean_seconds(run)
        if seconds:
            groups.setdefault(report.budget(run["keep"]), [_bar(unpruned)]).append(_bar(run))
    return groups


def html(bars: Sequence[Bar]) -> str:
    """Bars below each other, the longest as long as there is room, and what their colours mean."""
    longest = max(sum(bar.seconds.values()) for bar in bars) or 1.0
    stages = [stage for stage in COLOURS if any(stage in bar.seconds for bar in bars)]
    legend = "".join(
        f'<span><i class="block" style="background: {COLOURS[stage]}"></i>{stage}</span>' for stage in stages
    )
    rows = "".join(
        f'<span class="who">{escape(bar.name)}</span>'
        f'<span class="track">{"".join(_piece(bar, stage, longest) for stage in stages)}</span>'
        f'<span class="sum">{escape(bar.said)}</span>'
        for bar in bars
    )
    return f'<div class="bars">{rows}</div><div class="legend">{legend}</div>'


def _bar(run: Record) -> Bar:
    seconds = mean_seconds(run)
    said = f"{1000 * first_token(seconds):.1f} + {1000 * seconds['decode']:.1f} ms"
    return Bar(report.family(run), seconds, said)


def _piece(bar: Bar, stage: str, longest: float) -> str:
    seconds = max(0.0, bar.seconds.get(stage, 0.0))
    style = f"width: {100 * seconds / longest:.2f}%; background: {COLOURS[stage]}"
    return f'<i style="{style}" title="{stage} {1000 * seconds:.2f} ms"></i>'
