"""AdaKV: SnapKV with the entries of a layer shared out over its heads by what they attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmcompress.budget import largest_remainder
from mmcompress.errors import SpecError
from mmcompress.policies._scores import Pooling
from mmcompress.policies.snapkv import SnapKV
from mmcompress.registry import register_policy


@register_policy(
    "adakv",
    summary="SnapKV with more entries for KV heads whose attention is spread.",
    family="window attention",
    stage="kv",
    paper="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference, "
    "arXiv:2407.11550",
    licence="MIT",
)
@dataclass(frozen=True)
class AdaKV(SnapKV):
    """Heads hold as many entries as they have among the best of all heads, blended with equal shares (Section 3).

    Args:
        floor: the part of the budget that is shared out equally.
        compat: "official" rounds the authors' way, which misses the budget by an entry or two.
    """

    kernel: int = 7
    pooling: Pooling = "max"
    floor: float = 0.2
    compat: Literal["none", "official"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise SpecError(f"adakv: floor={self.floor} must be in [0, 1].")

    def head_budgets(self, scores: Tensor, stays: Tensor, keep: int) -> list[int]:
        """Shares of the entries that need not stay, the floor of every head among them."""
        needed = stays.sum(dim=1).tolist()
        free = [keep - count for count in needed]
        equal = [int(count * self.floor) for count in free]
        best = scores.masked_fill(stays, -torch.inf).flatten().argsort(descending=True, stable=True)[: sum(free)]
        wins = torch.bincount(best // scores.shape[1], minlength=len(scores)).tolist()
        if self.compat == "official":
            shares = [round(won * (1 - self.floor) + least) - least for won, least in zip(wins, equal, strict=True)]
        else:
            shares = largest_remainder(sum(free) - sum(equal), wins)
        return [sum(parts) for parts in zip(needed, equal, shares, strict=True)]
