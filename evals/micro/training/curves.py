"""A picture of a training log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

NO_SHARES = {"stage", "step", "steps", "seconds", "from"}
"""What a line of the log tells besides the loss and shares of right answers."""


def sittings(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The log, cut where a stage begins."""
    return [list(lines) for _, lines in groupby(rows, key=lambda row: (row["stage"], row.get("from")))]


def _title(row: Mapping[str, Any]) -> str:
    return f"{row['stage']}, trained on from {row['from']}" if "from" in row else str(row["stage"])


def draw(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Plot loss, and shares of right answers, of every stage over its steps."""
    stages = [(_title(lines[0]), lines) for lines in sittings(rows)]
    figure = Figure(figsize=(6 * max(1, len(stages)), 7), layout="constrained")
    axes = figure.subplots(2, max(1, len(stages)), squeeze=False, sharex="col")
    for column, (name, lines) in enumerate(stages):
        loss, shares = axes[0][column], axes[1][column]
        loss.plot([row["step"] for row in lines], [row["loss"] for row in lines], color="black", linewidth=1)
        loss.set_title(name)
        loss.set_ylabel("loss")
        loss.set_yscale("log")
        metrics = sorted({key for row in lines for key in row if key not in NO_SHARES | {"loss"}})
        for metric in metrics:
            points = [(row["step"], row[metric]) for row in lines if metric in row]
            shares.plot(*zip(*points, strict=True), label=metric, linewidth=1)
        shares.set_ylim(0, 1)
        shares.set_ylabel("share right")
        shares.set_xlabel("step")
        shares.grid(alpha=0.3)
        shares.legend(fontsize=8, loc="lower right")
    figure.suptitle(title)
    figure.savefig(path, dpi=80)
