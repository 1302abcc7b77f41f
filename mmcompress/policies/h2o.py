"""H2O: keep heavy hitters, which have received most attention so far, and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass

from mmcompress.policies._heavy_hitters import RunningHeavyHitters
from mmcompress.registry import register_policy


@register_policy(
    "h2o",
    summary="The entries that have received most attention so far and the most recent ones, at every step.",
    family="accumulated attention",
    stage="kv",
    paper="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, arXiv:2306.14048",
)
@dataclass(frozen=True)
class H2O(RunningHeavyHitters):
    """Attention is summed over all queries so far (Section 4; Algorithm 1); half of what stays is recent."""
