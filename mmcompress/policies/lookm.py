"""LOOK-M: text before images, and what goes merges into its nearest key that stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmcompress.kv_policy import KVRow
from mmcompress.policies._heavy_hitters import HeavyHitters
from mmcompress.policies._merging import absorb, others
from mmcompress.policies._scores import text_first
from mmcompress.registry import register_policy


@register_policy(
    "lookm",
    summary="Text entries first, then the most attended visual ones; what goes merges into the most similar key.",
    family="accumulated attention",
    stage="kv",
    paper="LOOK-M: Look-Once Optimization in KV Cache for Efficient Multimodal Long-Context Inference, "
    "arXiv:2406.18139",
    licence="MIT",
)
@dataclass(frozen=True)
class LookM(HeavyHitters):
    """Once behind the prompt: heavy hitters, text before images, and a merging rule (Section 3).

    Args:
        text_first: whether text goes only when no visual entry is left to go.
        merge: what an entry that stays becomes: "pivot", the mean of itself and of its means with each that merges
            into it; "weighted", the mean of all, by similarity; "none".
    """

    recent: int | float = 0.1
    text_first: bool = True
    merge: Literal["pivot", "weighted", "none"] = "pivot"

    def score(self, row: KVRow) -> Tensor:
        """Attention received, that of text above that of images."""
        scores = super().score(row)
        return text_first(scores, row.visual) if self.text_first else scores

    def hold(self, row: KVRow, kept: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What stays, with what goes merged in."""
        keys, values = super().hold(row, kept)
        if self.merge == "none":
            return keys, values
        merged = [self._merged(row.key[head], row.value[head], indices) for head, indices in enumerate(kept)]
        return [key for key, _ in merged], [value for _, value in merged]

    def _merged(self, key: Tensor, value: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[kept, dim]` of one head."""
        gone, unit = others(kept, len(key)), normalize(key.float(), dim=-1)
        similarity, target = (unit[gone] @ unit[kept].T).max(dim=1)
        merged = []
        for states in (key, value):
            centres, sources = states[kept], states[gone]
            if self.merge == "pivot":
                mean = (sources + centres[target]) / 2
                merged.append(absorb(centres, mean, target, torch.ones_like(similarity)))
            else:
                merged.append(absorb(centres, sources, target, (similarity + 1) / 2))
        return merged[0].to(key.dtype), merged[1].to(value.dtype)
