"""Keyformer: like H2O, with noisy logits and a rising temperature that make up for what has gone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmcompress.errors import SpecError
from mmcompress.kv_policy import KVRow
from mmcompress.policies._heavy_hitters import RunningHeavyHitters
from mmcompress.policies._noise import gumbel
from mmcompress.policies._scores import GroupReduction, reduce_group
from mmcompress.registry import register_policy

ROWS_AT_ONCE = 64


@register_policy(
    "keyformer",
    summary="The entries with the highest sum of Gumbel-softmax scores and the most recent ones, at every step.",
    family="accumulated attention",
    stage="kv",
    paper="Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative Inference, "
    "arXiv:2403.09054",
    licence="Apache-2.0",
)
@dataclass(frozen=True)
class Keyformer(RunningHeavyHitters):
    """Every query adds softmax((logits + Gumbel noise) / temperature) to the entries' scores (Section 3).

    Args:
        temperature: while the prompt is read.
        temperature_step: by how much it rises with every token generated.
        seed: of the noise, which depends on it, the layer, the head and the two tokens alone.
    """

    recent: int | float = 0.3
    group_reduction: GroupReduction = "sum"
    temperature: float = 1.0
    temperature_step: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0 or self.temperature_step < 0:
            raise SpecError("keyformer: temperature must be above 0, temperature_step at least 0.")

    def noise(self, row: KVRow, queries: Tensor) -> Tensor:
        """Gumbel noise `[kv_heads, group, queries, entries]` for the queries of the tokens numbered `queries`."""
        assert row.query is not None
        heads = row.grouped(torch.arange(len(row.query), device=row.key.device))
        return gumbel((self.seed, row.layer, heads[..., None, None], queries[:, None], row.place[:, None, None]))

    def observe(self, row: KVRow) -> Tensor:
        """Column sums of the noisy attention; few of its rows exist at a time."""
        assert row.query is not None
        temperature = self.temperature + row.generated * self.temperature_step
        keys = row.key.float().mT[:, None]
        entries = torch.arange(row.entries, device=row.key.device)
        total = torch.zeros(*row.grouped(row.query).shape[:2], row.entries, device=row.key.device)
        blocks = row.query.float().split(ROWS_AT_ONCE, dim=1), row.last_seen.split(ROWS_AT_ONCE)
        for query, last in zip(*blocks, strict=True):
            logits = row.grouped(query) @ keys * row.scaling + self.noise(row, row.place[0, last])
            hidden = entries > last[:, None]
            total += (logits / temperature).masked_fill(hidden, -torch.inf).softmax(dim=-1).sum(dim=2)
        return reduce_group(total, self.group_reduction)
