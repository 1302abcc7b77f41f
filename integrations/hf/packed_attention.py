"""Attention of one new token to rows that are held in codes, which are read as they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmcompress import ops
from mmcompress.integrations.hf.quantised import Row
from mmcompress.kv_policy import Packed, Quantiser


def reads_codes(rows: Sequence[Row], quantiser: Quantiser) -> bool:
    """Whether `attend` can be asked: all rows hold keys and values in codes that `ops` reads."""
    return quantiser.code_bits is not None and bool(rows) and all(row.keys.packed and row.values.packed for row in rows)


def attend(
    rows: Sequence[Row], quantiser: Quantiser, query: Tensor, key: Tensor, value: Tensor, scaling: float
) -> Tensor:
    """Attention of a token of every row to itself and what the row holds `[batch, heads, 1, dim]`.

    Args:
        rows: see `reads_codes`.
        quantiser: what packed them.
        query: `[batch, heads, 1, dim]`.
        key: `[batch, kv_heads, 1, dim]`, of the token.
        value: likewise.
        scaling: factor on the logits.
    """
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        alike[row.keys.tokens, row.keys.waiting, row.values.waiting].append(number)
    output = torch.empty_like(query)
    for numbers in alike.values():
        chosen = slice(None) if len(numbers) == len(rows) else numbers
        some = [rows[number] for number in numbers]
        output[chosen] = _attend_alike(some, quantiser, query[chosen], key[chosen], value[chosen], scaling)
    return output


def _attend_alike(
    rows: Sequence[Row], quantiser: Quantiser, query: Tensor, key: Tensor, value: Tensor, scaling: float
) -> Tensor:
    keys = Packed.stack([row.keys.packed[0] for row in rows])
    values = Packed.stack([row.values.packed[0] for row in rows])
    both = min(keys.tokens, values.tokens)
    both -= both % max(keys.tokens // part.shape[-2] for part in keys.parts)  # ranges of keys may be of several tokens
    recent_keys = [quantiser.unpack_keys(_part(keys, both, keys.tokens)), _stack([row.keys.exact for row in rows])]
    recent_values = [
        quantiser.unpack_values(_part(values, both, values.tokens)),
        _stack([row.values.exact for row in rows]),
    ]
    assert quantiser.code_bits is not None
    return ops.attention_decode_quant(
        query,
        _part(keys, 0, both).parts,
        _part(values, 0, both).parts,
        quantiser.code_bits,
        quantiser.code_bits,
        scaling,
        torch.cat([*recent_keys, key], dim=2),
        torch.cat([*recent_values, value], dim=2),
    )


def _part(packed: Packed, first: int, end: int) -> Packed:
    """The tokens from `first` up to `end`, where groups of tokens begin."""
    parts = []
    for part in packed.parts:
        group = packed.tokens // part.shape[-2]
        parts.append(part[..., first // group : end // group, :])
    return replace(packed, parts=tuple(parts), shape=(*packed.shape[:-2], end - first, packed.shape[-1]))


def _stack(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows) if len(rows) > 1 else rows[0][None]
