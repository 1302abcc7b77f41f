"""Attention of the newest token over a cache of packed codes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmcompress.kernels.attention_decode_quant import reference
from mmcompress.kernels.attention_decode_sparse import refuse_head_size
from mmcompress.kernels.dispatch import dispatched, of_one_dtype
from mmcompress.kernels.kv_quant import refuse_bits


def _fake(query: Tensor, *_: object, **__: object) -> Tensor:
    return query.new_empty(query.shape)


def _refuse(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_bits: int,
    value_bits: int,
    scaling: float,
    recent_key: Tensor | None = None,
    recent_value: Tensor | None = None,
    first_key: Tensor | None = None,
) -> str:
    recent = [part for part in (recent_key, recent_value) if part is not None]
    return (
        of_one_dtype(query, *keys[1:], *values[1:], *recent)
        or refuse_head_size(query)
        or refuse_bits(key_bits)
        or refuse_bits(value_bits)
    )


attention_decode_quant = dispatched(__name__, reference.attention_decode_quant, _fake, _refuse)
