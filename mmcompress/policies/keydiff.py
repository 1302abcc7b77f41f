"""KeyDiff: keep the keys that are least like the others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from mmcompress.kv_policy import Evictor, KVRow, Schedule
from mmcompress.registry import register_policy


@register_policy(
    "keydiff",
    summary="The entries whose keys are least similar to the mean key; reads no query.",
    family="key geometry",
    stage="kv",
    paper="KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained "
    "Environments, arXiv:2504.15364",
)
@dataclass(frozen=True)
class KeyDiff(Evictor):
    """Keys are ranked by cosine distance from the mean of the normalised keys (Section 3).

    Args:
        schedule: "step" goes on behind the prompt; with `every` in blocks, as the paper does on long inputs.
    """

    schedule: Schedule = "prefill"

    def score(self, row: KVRow) -> Tensor:
        """The less similar the better."""
        key = row.key.float()
        return -cosine_similarity(key, normalize(key, dim=-1).mean(dim=1, keepdim=True), dim=-1)
