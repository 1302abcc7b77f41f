"""The table of a benchmark: each method's time beside that of what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from mmcompress.evals.bench.timing import ENOUGH_SECONDS, REPEATS

COLUMNS = ("method", "tokens", "item", "kept", "ms/image", "against", "its ms/image", "ratio", "equal")
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


def table(rows: Sequence[Row], limit: float, notes: Sequence[str]) -> Table:
    """The rows as a table, notes below; what selects differently stands out."""
    left = ("method", "item", "against")
    caption = escape("\n".join(notes))
    drawn = Table(box=SIMPLE, padding=0, width=WIDTH, caption=caption, caption_justify="left", caption_style="dim")
    for heading in COLUMNS:
        drawn.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*map(escape, row.cells(limit)), style="bold red" if row.equal is False else "")
    return drawn


def markdown(rows: Sequence[Row], limit: float, notes: Sequence[str]) -> str:
    """The same in Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(row.cells(limit) for row in rows)]
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", *(f"- {note}" for note in notes), ""])
