"""SnapKV: keep what the last tokens of the prompt attend to, and these tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from mmcompress.errors import SpecError
from mmcompress.kv_policy import Evictor, KVNeeds, KVRow
from mmcompress.policies._scores import GroupReduction, Pooling, pool, reduce_group
from mmcompress.registry import register_policy


@register_policy(
    "snapkv",
    summary="The entries that the prompt's last tokens attend to most, smoothed, and these tokens.",
    family="window attention",
    stage="kv",
    paper="SnapKV: LLM Knows What You are Looking for Before Generation, arXiv:2404.14469",
    licence="Apache-2.0",
)
@dataclass(frozen=True)
class SnapKV(Evictor):
    """Entries before the observation window are ranked by the attention its queries pay to them (Section 4).

    Args:
        window: the prompt's last tokens, which observe and always stay.
        kernel: neighbouring entries that are smoothed over, an odd number.
        pooling: how they are.
        group_reduction: how the query heads that share a KV head become one (not in the paper, which has none).
    """

    window: int = 32
    kernel: int = 5
    pooling: Pooling = "avg"
    group_reduction: GroupReduction = "mean"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise SpecError(f"{self.info.name}: window={self.window} must be at least 1.")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise SpecError(f"{self.info.name}: kernel={self.kernel} must be odd and at least 1.")

    def needs(self) -> KVNeeds:
        """The queries of the window."""
        return KVNeeds(queries=self.window)

    @property
    def least(self) -> int:
        """The window."""
        return self.window

    def protected(self, row: KVRow, keep: int) -> Tensor:
        """The window."""
        return row.place >= row.seen - self.window

    def observed_attention(self, row: KVRow) -> Tensor:
        """What the window attends to each entry before it `[kv_heads, group, entries - window]`."""
        return row.grouped(row.rows(rows="sum"))[..., : row.entries - self.window]

    def score(self, row: KVRow) -> Tensor:
        """Attention of the window, smoothed."""
        observed = reduce_group(self.observed_attention(row), self.group_reduction)
        return pad(pool(observed, self.kernel, self.pooling), (0, self.window))
