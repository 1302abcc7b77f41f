"""PyramidKV: SnapKV with more entries in lower layers, where attention is spread, and fewer in higher ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmcompress.budget import largest_remainder
from mmcompress.errors import SpecError
from mmcompress.kv_policy import KVRow
from mmcompress.policies._scores import Pooling
from mmcompress.policies.snapkv import SnapKV
from mmcompress.registry import register_policy


@register_policy(
    "pyramidkv",
    summary="SnapKV with budgets that fall from the first layer to the last.",
    family="window attention",
    stage="kv",
    paper="PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling, arXiv:2406.02069",
    licence="MIT",
)
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """What layers hold beside the window falls linearly; on average it is the budget, exactly (Section 4).

    Args:
        beta: how many times less than the average the last layer holds beside the window.
        compat: "official" rounds the authors' way, which exceeds the budget by a few percent.
    """

    window: int = 8
    kernel: int = 7
    pooling: Pooling = "max"
    beta: int = 20
    compat: Literal["none", "official"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise SpecError(f"pyramidkv: beta={self.beta} must be at least 1.")

    def budget(self, row: KVRow, keep: int) -> int:
        """The budget of this layer; the same for all where entries are too few for a pyramid."""
        average = keep - self.window
        if row.layers == 1 or row.entries < 2 * average or average < 1 or row.entries <= keep:
            return keep
        highest = min(2 * average - average // self.beta, row.entries - self.window)
        lowest = 2 * average - highest
        if self.compat == "official":
            return self.window + highest - row.layer * ((highest - lowest) // (row.layers - 1))
        slopes = [highest * (row.layers - 1) - layer * (highest - lowest) for layer in range(row.layers)]
        return self.window + largest_remainder(average * row.layers, slopes)[row.layer]
