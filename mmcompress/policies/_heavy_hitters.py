"""What H2O, Keyformer and LOOK-M share: attention is counted up, heavy hitters and recent tokens stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mmcompress.budget import Budget
from mmcompress.errors import SpecError
from mmcompress.kv_policy import Evictor, KVNeeds, KVRow, Schedule
from mmcompress.policies._scores import GroupReduction, reduce_group


@dataclass(frozen=True)
class HeavyHitters(Evictor):
    """Entries before the most recent ones are ranked by the sum of the attention they receive.

    Args:
        recent: recent entries that always stay, as a share of the budget or a count.
        group_reduction: how the query heads that share a KV head become one.
    """

    recent: int | float = 0.5
    group_reduction: GroupReduction = "mean"

    def __post_init__(self) -> None:
        if self.recent <= 0 or (isinstance(self.recent, float) and self.recent > 1):
            raise SpecError(f"{self.info.name}: recent={self.recent} must be a fraction in (0, 1] or a count >= 1.")

    def needs(self) -> KVNeeds:
        """All queries of the prompt."""
        return KVNeeds(queries="all")

    @property
    def least(self) -> int:
        """The recent entries, if they are a count."""
        return self.recent if isinstance(self.recent, int) else 0

    def protected(self, row: KVRow, keep: int) -> Tensor:
        """The recent entries."""
        return row.place >= row.seen - self.recent_entries(keep)

    def observe(self, row: KVRow) -> Tensor:
        """How much the queries attend to each entry."""
        return reduce_group(row.column_sums(), self.group_reduction)

    def score(self, row: KVRow) -> Tensor:
        """What was observed so far."""
        assert row.observed is not None
        return row.observed

    def recent_entries(self, keep: int) -> int:
        """How many of `keep` entries are kept as recent ones."""
        return Budget(self.recent).tokens(keep)


@dataclass(frozen=True)
class RunningHeavyHitters(HeavyHitters):
    """Attention goes on being summed, and entries go on being ranked, at every step.

    Args:
        schedule: "prefill" ranks the prompt once.
        compat: "official" counts the coming token among the recent ones as the authors' masks do, so that the oldest
            of these always goes and one entry less stays.
    """

    schedule: Schedule = "step"
    compat: Literal["none", "official"] = "none"

    def needs(self) -> KVNeeds:
        """All queries, of the prompt and behind it."""
        return KVNeeds(queries="all", steps=self.schedule == "step")

    def select(self, row: KVRow, keep: int) -> list[Tensor]:
        """Recent entries and heavy hitters."""
        kept = super().select(row, keep)
        if self.compat == "official":
            oldest = row.entries - self.recent_entries(keep)
            kept = [indices[indices != oldest] for indices in kept]
        return kept
