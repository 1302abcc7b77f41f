"""Methods that remove tokens several times, each time down to a share of those that entered the LLM."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mmcompress.budget import left_by, require_ratios
from mmcompress.errors import SpecError
from mmcompress.llm_method import LLMFacts, LLMMethod
from mmcompress.types import Positions


@dataclass(frozen=True)
class ProgressiveMethod(LLMMethod):
    """Where and by how much.

    Args:
        prune_layers: layers before which tokens are removed; None: the paper's, scaled to the model's depth.
        ratios: shares of the tokens left by every removal but the last, which leaves `keep`; shares below `keep` count
            as `keep`. None: as the paper's schedule leads to `keep`.
    """

    paper_layers: ClassVar[tuple[int, ...]]

    prune_layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        name, layers, ratios = self.info.name, self.prune_layers, self.ratios
        if layers is not None and (not layers or layers[0] < 1 or list(layers) != sorted(set(layers))):
            raise SpecError(f"{name}: prune_layers={list(layers)} must ascend from 1 or more, as in [7, 9, 12].")
        if ratios is not None:
            require_ratios(name, ratios, len(self.paper_layers if layers is None else layers))

    @property
    def positions(self) -> Positions:
        """Contiguous after every removal."""
        return "renumber"

    def layers(self, llm: LLMFacts) -> tuple[int, ...]:
        """Those asked for, or the paper's."""
        return self.prune_layers or llm.scale_layers(self.paper_layers, 32)

    @abstractmethod
    def shares(self, keep: float, times: int) -> Sequence[float]:
        """Shares left by every removal but the last of `times`, which leaves `keep`."""

    def schedule(self, tokens: int, keep: int, ratio: float, llm: LLMFacts) -> list[int]:
        """Every share of `tokens` rounded down, and `keep`."""
        shares = self.shares(ratio, len(self.layers(llm))) if self.ratios is None else self.ratios
        return left_by(shares, tokens, keep)
