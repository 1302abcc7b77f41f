"""What can be read from the queries and keys of one encoder layer, without an attention map.

Every function takes `query` and `key` `[batch, heads, tokens, dim]` and the logit scaling, and returns a float32
tensor whose second axis runs over all encoder tokens, CLS (index 0, where there is one) included.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mmcompress import ops


def cls_rows(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Softmax attention row of the CLS token, `[batch, tokens, heads]`."""
    return ops.attention_rows(query[:, :, :1], key, scaling)[:, :, 0].transpose(1, 2)


def cls_logits(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """The CLS row before the softmax, averaged over heads, `[batch, tokens]` (GlobalCom2)."""
    return (query[:, :, :1].float() @ key.float().transpose(-1, -2) * scaling)[:, :, 0].mean(dim=1)


def cls_rows_full_width(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """The CLS row as one head of full width, `[batch, tokens]` (PruMerge)."""
    heads = query.shape[1]
    wide_query, wide_key = query[:, :, :1].transpose(1, 2).flatten(2), key.transpose(1, 2).flatten(2)
    return ops.attention_rows(wide_query[:, None], wide_key[:, None], scaling / heads**0.5)[:, 0, 0]


def received_attention(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Attention each token receives, averaged over heads and queries, `[batch, tokens]`."""
    return ops.attention_colsum(query, key, scaling) / (query.shape[1] * query.shape[2])


def keys(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Keys with heads concatenated, `[batch, tokens, heads * dim]`."""
    return key.float().transpose(1, 2).flatten(2)


def key_metric(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Keys averaged over heads, `[batch, tokens, dim]` (ToMe, VisionZip)."""
    return key.float().mean(dim=1)


STATISTICS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    function.__name__: function
    for function in (cls_rows, cls_logits, cls_rows_full_width, received_attention, keys, key_metric)
}
NEEDS_CLS = frozenset({"cls_rows", "cls_logits", "cls_rows_full_width"})
