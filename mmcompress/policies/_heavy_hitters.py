"""What H2O and Keyformer share: attention is counted up, heavy hitters and recent tokens stay."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mmcompress.budget import Budget
from mmcompress.errors import SpecError
from mmcompress.kv_policy import Evictor, KVNeeds, KVRow, Schedule
from mmcompress.policies._scores import GroupReduction


@dataclass(frozen=True)
class HeavyHitters(Evictor):
    """Entries before the most recent ones are ranked by a running sum of the attention they receive.

    Args:
        recent: recent entries that always stay, as a share of the budget or a count.
        group_reduction: how the query heads that share a KV head become one.
        schedule: when entries go.
        compat: "official" counts the coming token among the recent ones as the authors' masks do, so that the oldest
            of these always goes and one entry less stays.
    """

    recent: int | float = 0.5
    group_reduction: GroupReduction = "mean"
    schedule: Schedule = "step"
    compat: Literal["none", "official"] = "none"

    def __post_init__(self) -> None:
        if self.recent <= 0 or (isinstance(self.recent, float) and self.recent > 1):
            raise SpecError(f"{self.info.name}: recent={self.recent} must be a fraction in (0, 1] or a count >= 1.")

    def needs(self) -> KVNeeds:
        """All queries."""
        return KVNeeds(queries="all", steps=self.schedule == "step")

    def protected(self, row: KVRow, keep: int) -> Tensor:
        """The recent entries."""
        return row.place >= row.seen - self._recent(keep)

    @abstractmethod
    def observe(self, row: KVRow) -> Tensor:
        """What the queries attend to each entry."""

    def score(self, row: KVRow) -> Tensor:
        """What was observed so far."""
        assert row.observed is not None
        return row.observed

    def select(self, row: KVRow, keep: int) -> list[Tensor]:
        """Recent entries and heavy hitters."""
        kept = super().select(row, keep)
        if self.compat == "official":
            oldest = row.entries - self._recent(keep)
            kept = [indices[indices != oldest] for indices in kept]
        return kept

    def _recent(self, keep: int) -> int:
        return Budget(self.recent).tokens(keep)
