"""Decode attention over codes in plain torch: all are unpacked first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmcompress.kernels.attention_decode_sparse.reference import attend
from mmcompress.kernels.kv_quant.reference import kv_dequant


def attention_decode_quant(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_bits: int,
    value_bits: int,
    scaling: float,
    recent_key: Tensor | None = None,
    recent_value: Tensor | None = None,
    first_key: Tensor | None = None,
) -> Tensor:
    """Attention of one new token over packed entries and the recent ones behind them (KIVI).

    Args:
        query: `[batch, heads, 1, dim]`.
        keys: what `kv_quant` made of `[batch, kv_heads, packed, dim]`: codes, lowest and highest values of groups of
            channels or of tokens; kv_heads divides heads (GQA).
        values: likewise.
        key_bits: of a code of a key.
        value_bits: of a code of a value.
        scaling: factor on the logits.
        recent_key: `[batch, kv_heads, recent, dim]`, not packed; none if it is None.
        recent_value: likewise.
        first_key: `[batch]`, the first entry that is no padding; 0 if it is None.

    Returns:
        `[batch, heads, 1, dim]` in the type of `query`.
    """
    key, value = _unpacked(keys, key_bits), _unpacked(values, value_bits)
    if recent_key is not None and recent_value is not None:
        key, value = torch.cat([key, recent_key], dim=2), torch.cat([value, recent_value], dim=2)
    hidden = torch.zeros(key.shape[:3], dtype=torch.bool, device=key.device)
    if first_key is not None:
        hidden |= torch.arange(key.shape[2], device=key.device) < first_key[:, None, None]
    return attend(query, key, value, hidden, scaling)


def _unpacked(packed: Sequence[Tensor], bits: int) -> Tensor:
    codes, low, high = packed
    return kv_dequant(codes, low, high, bits, -1 if low.shape[-2] == codes.shape[-2] else -2)
