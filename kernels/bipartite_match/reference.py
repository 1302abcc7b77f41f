"""Matching and merging in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize


def bipartite_match(metric: Tensor) -> tuple[Tensor, Tensor]:
    """For each token at an even place the most similar one at an odd place (ToMe, Section 3); of equal ones the first.

    Args:
        metric: `[..., tokens, dim]`, at least two tokens, compared by cosine.

    Returns:
        Similarity in float32 and number among the odd places, `[..., (tokens + 1) // 2]` each.
    """
    unit = normalize(metric.float(), dim=-1)
    best, nearest = (unit[..., ::2, :] @ unit[..., 1::2, :].transpose(-1, -2)).max(dim=-1)
    return best, nearest


def merge_tokens(values: Tensor, group: Tensor, outputs: int) -> Tensor:
    """Add up `values` by group, `[..., outputs, dim]`; scaled by shares beforehand it is a weighted mean.

    Args:
        values: `[..., tokens, dim]`.
        group: `[..., tokens]`, the output that each token goes into.
        outputs: how many there are.
    """
    empty = values.new_zeros(*values.shape[:-2], outputs, values.shape[-1])
    return empty.scatter_add(-2, group[..., None].expand(values.shape), values)
