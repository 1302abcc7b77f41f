"""EMS: evict, then merge by similarity, with globally and locally attended entries both worth keeping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from mmcompress.errors import SpecError
from mmcompress.kv_policy import Evictor, KVNeeds, KVRow
from mmcompress.policies._merging import absorb, others
from mmcompress.policies._scores import reduce_group
from mmcompress.registry import register_policy


@register_policy(
    "ems",
    summary="Entries attended to globally or locally; those next in rank merge into similar ones. A reconstruction.",
    family="accumulated attention",
    stage="kv",
    paper="EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on Global-Local "
    "Importance, arXiv:2412.08521",
)
@dataclass(frozen=True)
class EMS(Evictor):
    """A reconstruction from the abstract, as the authors have published no code and no constants.

    Args:
        window: the prompt's last tokens, whose attention is the local one and which always stay.
        merged: how many entries merge for one that stays beside the window; the rest of them go.
        threshold: a less similar entry merges into none.
    """

    window: int = 32
    merged: float = 1.0
    threshold: float = 0.6

    def __post_init__(self) -> None:
        if self.window < 1 or self.merged < 0:
            raise SpecError(f"ems: window={self.window} must be at least 1 and merged={self.merged} at least 0.")

    def needs(self) -> KVNeeds:
        """All queries of the prompt."""
        return KVNeeds(queries="all")

    @property
    def least(self) -> int:
        """The window."""
        return self.window

    def protected(self, row: KVRow, keep: int) -> Tensor:
        """The window."""
        return row.place >= row.seen - self.window

    def observe(self, row: KVRow) -> Tensor:
        """How much the queries attend to each entry."""
        return reduce_group(row.column_sums(), "mean")

    def attention(self, row: KVRow) -> tuple[Tensor, Tensor]:
        """Global and local attention per query that sees an entry before the window, of equal mean."""
        assert row.observed is not None
        before = row.entries - self.window
        readers = row.seen - row.place[:, :before]
        overall = row.observed[:, :before] / readers
        local = reduce_group(row.grouped(row.rows(rows="mean", last=self.window)), "mean")[:, :before]
        mean = local.mean(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return overall, local * overall.mean(dim=1, keepdim=True) / mean

    def score(self, row: KVRow) -> Tensor:
        """The higher of both."""
        return pad(torch.maximum(*self.attention(row)), (0, self.window))

    def hold(self, row: KVRow, kept: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What stays, with what is next in rank and similar enough merged in."""
        keys, values = super().hold(row, kept)
        if len(kept[0]) == row.entries:
            return keys, values
        scores = self.score(row)
        for head, indices in enumerate(kept):
            centres, gone = indices[: -self.window], others(indices, row.entries)
            ranked = gone[scores[head, gone].argsort(descending=True, stable=True)]
            sources = ranked[: round(self.merged * len(centres))]
            if len(centres) == 0:
                continue
            redundancy, target = self.redundancy(row.key[head], row.value[head], sources, centres)
            similar = redundancy >= self.threshold
            for held, states in ((keys, row.key[head]), (values, row.value[head])):
                merging = states[sources[similar]]
                merged = absorb(
                    states[centres], merging, target[similar], torch.ones(len(merging), device=states.device)
                )
                held[head] = torch.cat([merged.to(states.dtype), states[indices[-self.window :]]])
        return keys, values

    def redundancy(self, key: Tensor, value: Tensor, sources: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        """How similar each of `sources` is to the most similar of `centres`, in key and value, and which that is."""
        similarity = [
            (unit[sources] @ unit[centres].T).relu()
            for unit in (normalize(states.float(), dim=-1) for states in (key, value))
        ]
        best = (similarity[0] * similarity[1]).max(dim=1)
        return best.values, best.indices
