"""Decode attention that unpacks codes as it reads them; what is not packed is read as it is, torch joins both."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from mmcompress.kernels.attention_decode_sparse.triton import absorb, block, finish, join, over_rows, split, split_out
from mmcompress.kernels.dispatch.triton import multiply, vectors

GROUP = 32
"""Entries of a block: those that share a range in the usual layouts."""


@triton.jit
def _states(
    codes,
    low,
    high,
    entry,
    seen,
    code_line,
    range_line,
    TOKEN_GROUP: tl.constexpr,
    CHANNEL_GROUP: tl.constexpr,
    SAME: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """What the codes of a block of entries stand for `[entries, dim]`, in the type of their ranges."""
    EACH: tl.constexpr = 8 // BITS
    byte, dim = tl.arange(0, DIM // EACH), tl.arange(0, DIM)
    packed = tl.load(
        codes + code_line + entry[:, None] * (WIDTH // EACH) + byte[None, :],
        seen[:, None] & (byte < WIDTH // EACH)[None, :],
        0,
    ).to(tl.int32)
    digits = (packed[:, :, None] >> (tl.arange(0, EACH) * BITS)[None, None, :]) & (2**BITS - 1)
    digits = tl.reshape(digits, [ENTRIES, DIM]).to(tl.float32)
    of_group = (tl.min(entry, 0) if SAME else entry) // TOKEN_GROUP
    inside = (dim < WIDTH)[None, :]
    if not SAME:
        of_group = of_group[:, None]
        inside = inside & seen[:, None]
    place = range_line + of_group * (WIDTH // CHANNEL_GROUP) + dim[None, :] // CHANNEL_GROUP
    least, most = tl.load(low + place, inside, 0.0), tl.load(high + place, inside, 0.0)
    offset = least.to(tl.float32)
    return (digits * ((most.to(tl.float32) - offset) / (2**BITS - 1.0)) + offset).to(least.dtype)


@triton.jit
def _codes(
    query,
    key_codes,
    key_low,
    key_high,
    value_codes,
    value_low,
    value_high,
    first_key,
    out,
    lse,
    scaling,
    heads,
    group,
    tokens,
    each,
    query_batch,
    query_head,
    query_dim,
    key_code_line,
    key_range_line,
    value_code_line,
    value_range_line,
    HAS_FIRST: tl.constexpr,
    KEY_TOKENS: tl.constexpr,
    KEY_CHANNELS: tl.constexpr,
    KEY_SAME: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_TOKENS: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    VALUE_SAME: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    part, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dim, member, line = tl.arange(0, DIM), tl.arange(0, GROUP), batch * tl.num_programs(1) + kv_head
    head = kv_head * group + member
    rows = vectors(query + batch * query_batch + head * query_head, member < group, dim, query_dim, WIDTH)
    first = tl.load(first_key + batch) if HAS_FIRST else 0
    largest = tl.full([GROUP], float("-inf"), tl.float32)
    mass = tl.zeros([GROUP], tl.float32)
    total = tl.zeros([GROUP, DIM], tl.float32)
    for start in range(part * each, tl.minimum((part + 1) * each, tokens), ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        seen = entry < tokens
        keys = _states(
            key_codes, key_low, key_high, entry, seen, line * key_code_line, line * key_range_line,
            KEY_TOKENS, KEY_CHANNELS, KEY_SAME, KEY_BITS, WIDTH, DIM, ENTRIES,
        )  # fmt: skip
        logits = multiply(rows, tl.trans(keys), tl.zeros([GROUP, ENTRIES], tl.float32)) * scaling
        logits = tl.where((seen & (entry >= first))[None, :], logits, float("-inf"))
        values = _states(
            value_codes, value_low, value_high, entry, seen, line * value_code_line, line * value_range_line,
            VALUE_TOKENS, VALUE_CHANNELS, VALUE_SAME, VALUE_BITS, WIDTH, DIM, ENTRIES,
        )  # fmt: skip
        largest, mass, total = absorb(largest, mass, total, logits, values)
    place = (batch * heads + head) * tl.num_programs(0) + part
    finish(largest, mass, total, out, lse, place, member < group, dim, WIDTH)


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
    """See `reference.attention_decode_quant`."""
    keys, values = map(_dense, (keys, values))
    batch, heads, _, width = query.shape
    kv_heads, tokens = keys[0].shape[1:3]
    splits, each = split(tokens, batch * kv_heads)
    out, lse = split_out(query, splits)
    sizes = block(query, GROUP)
    groups = [(tokens // low.shape[2], width // low.shape[3]) for _, low, _ in (keys, values)]
    (key_tokens, key_channels), (value_tokens, value_channels) = groups
    _codes[splits, kv_heads, batch](
        query,
        *keys,
        *values,
        first_key,
        out,
        lse,
        scaling,
        heads,
        heads // kv_heads,
        tokens,
        each,
        *(query.stride(dim) for dim in (0, 1, 3)),
        *map(_line, (*keys[:2], *values[:2])),
        HAS_FIRST=first_key is not None,
        KEY_TOKENS=key_tokens,
        KEY_CHANNELS=key_channels,
        KEY_SAME=key_tokens % sizes["ENTRIES"] == 0,
        KEY_BITS=key_bits,
        VALUE_TOKENS=value_tokens,
        VALUE_CHANNELS=value_channels,
        VALUE_SAME=value_tokens % sizes["ENTRIES"] == 0,
        VALUE_BITS=value_bits,
        GROUP=max(16, triton.next_power_of_2(heads // kv_heads)),
        **sizes,
        num_stages=2,
    )
    found = [(out, lse)]
    if recent_key is not None and recent_value is not None:
        recent_first = None if first_key is None else first_key - tokens
        found.append(over_rows(query, recent_key, recent_value, scaling, recent_first))
    return join(found, query)


def _dense(parts: Sequence[Tensor]) -> list[Tensor]:
    """As they are where they are a stretch of tokens of what is dense, which is read without a copy."""
    if parts[1].stride() == parts[2].stride() and all(map(_in_lines, parts)):
        return list(parts)
    return [part.contiguous() for part in parts]


def _in_lines(part: Tensor) -> bool:
    batch_stride, head_stride, *inner = part.stride()
    return inner == [part.shape[3], 1] and (part.shape[0] == 1 or batch_stride == part.shape[1] * head_stride)


def _line(part: Tensor) -> int:
    """How far heads are apart."""
    return part.stride(1 if part.shape[1] > 1 else 0)
