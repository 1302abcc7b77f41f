"""TGV-KV: text that is attended to decides which visual entries stay, and how many each layer holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmcompress.errors import SpecError
from mmcompress.kv_policy import Evictor, KVNeeds, KVRow, Schedule
from mmcompress.policies._layers import in_proportion
from mmcompress.policies._scores import text_first
from mmcompress.registry import register_policy


@register_policy(
    "tgv-kv",
    summary="Visual entries by what attended text attends to, text last; layers by how much text attends to images.",
    family="text attention",
    stage="kv",
    paper="TGV-KV: Text-Grounded KV Eviction for Vision-Language Models, arXiv:2606.03075",
    licence="MIT",
)
@dataclass(frozen=True)
class TGVKV(Evictor):
    """The text behind the images votes, each token by how much attention it receives itself.

    At every later step the entry goes that the coming token attends to least, a visual one as long as there are any.

    Args:
        sinks: how many of the first entries always stay.
        recent: how many of the last.
    """

    sinks: int = 4
    recent: int = 1

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 0:
            raise SpecError(f"tgv-kv: sinks={self.sinks} and recent={self.recent} must be at least 0.")

    def needs(self) -> KVNeeds:
        """The queries of the text behind the images, those of later tokens, and masses of all layers."""
        return KVNeeds(queries="question", steps=True, masses=True)

    @property
    def schedule(self) -> Schedule:
        """At every step."""
        return "step"

    def mass(self, row: KVRow) -> Tensor:
        """How much text attends to images."""
        return row.rows("mean", "sum")[row.visual[0]].sum()

    def budget(self, row: KVRow, keep: int) -> int:
        """In proportion to this layer's mass."""
        assert row.masses is not None
        prompt = row.seen - row.generated
        if not self.least <= keep < prompt:
            return keep
        return in_proportion(keep * row.layers, row.masses.tolist(), self.least, prompt)[row.layer]

    @property
    def least(self) -> int:
        """The first and the last entries."""
        return self.sinks + self.recent

    def protected(self, row: KVRow, keep: int) -> Tensor:
        """The first and the last entries."""
        return (row.place < self.sinks) | (row.place >= row.seen - self.recent)

    def score(self, row: KVRow) -> Tensor:
        """The same for all heads: votes for visual entries, attention received by text, above all of these."""
        rows = row.rows(heads="mean")
        received = rows.sum(dim=0)
        readers = torch.arange(len(rows), 0, -1, device=rows.device)
        votes = (received[-len(rows) :] / readers) @ rows
        return text_first(torch.where(row.visual, votes, received), row.visual)
