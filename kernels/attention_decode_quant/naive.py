"""Ground truth: one head at a time, over what its codes stand for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from mmcompress.kernels.kv_quant.naive import kv_dequant


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
    """Softmax over all entries, packed and recent, times their values."""
    states = []
    for (codes, low, high), bits, recent in ((keys, key_bits, recent_key), (values, value_bits, recent_value)):
        old = kv_dequant(codes, low, high, bits, -1 if low.shape[-2] == codes.shape[-2] else -2)
        states.append(old if recent is None else torch.cat([old, recent], dim=2))
    key, value = states
    group = query.shape[1] // key.shape[1]
    out = torch.full(query.shape, float("nan"))
    for b, h in itertools.product(*map(range, query.shape[:2])):
        first = 0 if first_key is None else int(first_key[b])
        logits = key[b, h // group, first:].float() @ query[b, h, 0].float() * scaling
        out[b, h, 0] = logits.softmax(dim=0) @ value[b, h // group, first:].float()
    return out.to(query.dtype)
