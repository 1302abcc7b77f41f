"""Expected Attention: keep what queries yet to come are expected to attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmcompress.errors import SpecError
from mmcompress.kv_policy import Evictor, KVNeeds, KVRow
from mmcompress.policies._rotary import rotate
from mmcompress.registry import register_policy


@register_policy(
    "expected-attention",
    summary="The entries that queries distributed like the prompt's are expected to attend to, weighted by value norm.",
    family="query statistics",
    stage="kv",
    paper="Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution, "
    "arXiv:2510.00636",
    licence="Apache-2.0",
)
@dataclass(frozen=True)
class ExpectedAttention(Evictor):
    """Queries are taken as normally distributed; future ones are these, turned to the mean of future positions.

    Args:
        future: how many positions behind the prompt are averaged over.
        sinks: how many of the first entries always stay; their queries are not counted.
        covariance: whether the covariance of the queries counts, beside their mean.
        epsilon: added to the attention before it is multiplied by value norms.
    """

    future: int = 512
    sinks: int = 4
    covariance: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        if self.future < 1 or self.sinks < 0 or self.epsilon < 0:
            raise SpecError("expected-attention: future must be at least 1, sinks and epsilon at least 0.")

    def needs(self) -> KVNeeds:
        """All queries before rotation."""
        return KVNeeds(queries="all", unrotated=True)

    @property
    def least(self) -> int:
        """The sinks."""
        return self.sinks

    def protected(self, row: KVRow, keep: int) -> Tensor:
        """The sinks."""
        return row.place < self.sinks

    def score(self, row: KVRow) -> Tensor:
        """Expected attention among the entries that are no sinks, times value norm."""
        mean, covariance = self.future_queries(row)
        keys = row.key.float()[:, None]
        logits = (keys @ mean[..., None])[..., 0] * row.scaling
        if self.covariance:
            logits += ((keys @ covariance) * keys).sum(dim=-1) * row.scaling**2 / 2
        sinks = self.protected(row, 0)
        attention = logits.masked_fill(sinks[:, None], -torch.inf).softmax(dim=-1).mean(dim=1)
        return (attention + self.epsilon) * row.value.float().norm(dim=-1)

    def future_queries(self, row: KVRow) -> tuple[Tensor, Tensor]:
        """Mean `[kv_heads, group, dim]` and covariance `[kv_heads, group, dim, dim]` of the queries to come."""
        assert row.unrotated is not None and row.rotation is not None
        first = row.seen - row.unrotated.shape[1]  # of a later turn, whose queries are no sinks
        queries = row.grouped(row.unrotated[:, max(self.sinks - first, 0) :])
        mean = queries.mean(dim=2, keepdim=True)
        covariance = (queries - mean).mT @ (queries - mean) / queries.shape[2]
        places = torch.arange(row.seen, row.seen + self.future, device=row.key.device)
        cosine, sine = (part.float().mean(dim=0) for part in row.rotation(places))
        turned = rotate(rotate(covariance, (cosine, sine)).mT, (cosine, sine))
        return rotate(mean, (cosine, sine))[:, :, 0], turned
