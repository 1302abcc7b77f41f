"""The table of a benchmark, and the rows of the one of selections."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmcompress.evals.bench.timing import ENOUGH_SECONDS, REPEATS

COLUMNS = ("method", "tokens", "item", "kept", "ms/image", "against", "its ms/image", "ratio", "equal")
WORDS = ("method", "methods", "item", "against", "op", "shape")
"""The columns that hold words, not numbers."""
WIDTH = 116
NOTE = (
    f"ms/image: median over {REPEATS} runs of a batch, fewer where they take {ENOUGH_SECONDS:g} s, after a warm-up of "
    "one image. against: the formula, image by image over the matrix of all similarities (plain loop), or the method "
    "called image by image (one by one). ratio: above 1 the method is the faster. equal: both kept the same tokens, "
    "with the same weights."
)


@dataclass(frozen=True)
class Row:
    """A method on items of one size; a time is None where one image alone took longer than the limit.

    Args:
        method: its spec, without the budget.
        tokens: of an item.
        item: what the tokens form.
        kept: tokens kept of the first item.
        ms: milliseconds per image.
        against: what the method is compared with.
        against_ms: milliseconds per image of that.
        equal: whether both selected the same; None unless both finished.
    """

    method: str
    tokens: int
    item: str
    kept: int | None
    ms: float | None
    against: str
    against_ms: float | None
    equal: bool | None

    @property
    def ratio(self) -> float | None:
        """Time of what the method is compared with, over its own."""
        return None if self.ms is None or self.against_ms is None else self.against_ms / self.ms

    def cells(self, limit: float) -> list[str]:
        """The row as text, in the order of `COLUMNS`."""
        ms, against_ms = (f"> {limit:g} s" if value is None else f"{value:.2f}" for value in (self.ms, self.against_ms))
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        kept = "" if self.kept is None else str(self.kept)
        equal = {True: "yes", False: "NO", None: ""}[self.equal]
        return [self.method, str(self.tokens), self.item, kept, ms, self.against, against_ms, ratio, equal]


def table(columns: Sequence[str], cells: Sequence[Sequence[str]], notes: Sequence[str]) -> Table:
    """The cells as a table, notes below; a row that ends in NO stands out."""
    caption = escape("\n".join(notes))
    drawn = Table(box=SIMPLE, padding=0, width=WIDTH, caption=caption, caption_justify="left", caption_style="dim")
    for heading in columns:
        drawn.add_column(heading, justify="left" if heading in WORDS else "right", no_wrap=True)
    for row in cells:
        drawn.add_row(*map(escape, row), style="bold red" if row[-1] == "NO" else "")
    return drawn


def markdown(columns: Sequence[str], cells: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """The same in Markdown."""
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *(f"- {note}" for note in notes), ""])


@dataclass(frozen=True)
class Sheet:
    """One table of several."""

    columns: Sequence[str]
    cells: Sequence[Sequence[str]]


def publish(
    out: Path,
    columns: Sequence[str],
    cells: Sequence[Sequence[str]],
    notes: Sequence[str],
    record: Mapping[str, Any],
    console: Console,
) -> None:
    """Print the table, write it and `record` to `table.md` and `results.json` in the folder `out`, and say so."""
    publish_sheets(out, [Sheet(columns, cells)], notes, record, console)


def publish_sheets(
    out: Path, sheets: Sequence[Sheet], notes: Sequence[str], record: Mapping[str, Any], console: Console
) -> None:
    """The same with several tables, notes below the last."""
    below = [*([] for _ in sheets[1:]), notes]
    for sheet, said in zip(sheets, below, strict=True):
        console.print(table(sheet.columns, sheet.cells, said), width=WIDTH, crop=False)
    text = "\n".join(markdown(sheet.columns, sheet.cells, said) for sheet, said in zip(sheets, below, strict=True))
    (out / "table.md").write_text(text, encoding="utf-8")
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(f"wrote {out}/table.md and results.json", highlight=False)
