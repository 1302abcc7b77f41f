"""StreamingLLM: keep the first few tokens, where attention sinks, and the most recent ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmcompress.errors import SpecError
from mmcompress.kv_policy import Evictor, KVRow, Schedule
from mmcompress.policies._rotary import rotate, unrotate
from mmcompress.registry import register_policy
from mmcompress.types import Positions


@register_policy(
    "streamingllm",
    summary="The first few entries and the most recent ones, at every step.",
    family="recency",
    stage="kv",
    paper="Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453",
    licence="MIT",
)
@dataclass(frozen=True)
class StreamingLLM(Evictor):
    """Attention sinks and a rolling window of recent tokens (Section 3.2).

    Args:
        sinks: how many of the first tokens always stay.
        compat: "official" numbers what stays by its place in the cache, as the paper does; here positions stay what
            they were, as those of images have no order in a cache.
    """

    sinks: int = 4
    compat: Literal["none", "official"] = "none"

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise SpecError(f"streamingllm: sinks={self.sinks} must be at least 0.")

    @property
    def schedule(self) -> Schedule:
        """At every step."""
        return "step"

    @property
    def positions(self) -> Positions:
        """See `compat`."""
        return "renumber" if self.compat == "official" else "original"

    @property
    def least(self) -> int:
        """The sinks."""
        return self.sinks

    def protected(self, row: KVRow, keep: int) -> Tensor:
        """The sinks."""
        return row.place < self.sinks

    def score(self, row: KVRow) -> Tensor:
        """The later the better."""
        return row.place.float()

    def hold(self, row: KVRow, kept: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What stays, its keys rotated on to where they come to stand if they are renumbered."""
        keys, values = super().hold(row, kept)
        if self.positions == "renumber":
            assert row.rotation is not None
            places = torch.arange(row.entries, device=row.key.device)
            keys = [
                rotate(unrotate(key.float(), row.rotation(indices)), row.rotation(places[: len(indices)])).to(key.dtype)
                for key, indices in zip(keys, kept, strict=True)
            ]
        return keys, values
