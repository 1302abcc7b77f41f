"""Calls of every op, with shapes that fill no block and strides as attention layers hand them over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmcompress.kernels.kv_quant.reference import kv_quant

Call = tuple[str, tuple[Any, ...]]
HEAD_SIZES = (64, 80, 96, 128)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def heads_last(batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """`[batch, heads, tokens, dim]` as a projection leaves it: heads beside each other in a row of a wider one."""
    wide = randn(batch, tokens, 2, heads, dim, seed=seed, dtype=dtype)
    return wide[:, :, 1].transpose(1, 2)


def attention(dim: int, dtype: torch.dtype, queries: int, keys: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    return heads_last(batch, 4, queries, dim, dtype), heads_last(batch, 2, keys, dim, dtype, seed=1)


def packed_bounds(queries: int, keys: int) -> tuple[Tensor, Tensor]:
    """The last and the first key that each query sees in a causal batch of two packed sequences."""
    last = torch.arange(keys - queries, keys)
    return last, torch.where(last < keys // 2, 0, keys // 2)


def rows(dim: int, dtype: torch.dtype, heads: str | None = None, joined: str | None = None) -> Call:
    query, key = attention(dim, dtype, 5, 139, batch=2)
    return "attention_rows", (query[:, :, ::2], key, dim**-0.5, torch.tensor([3, 70, 138]), None, heads, joined)


def packed_rows(dim: int, dtype: torch.dtype) -> Call:
    query, key = attention(dim, dtype, 3, 7)
    return "attention_rows", (query, key, dim**-0.5, *packed_bounds(3, 7))


def cls_row(dim: int, dtype: torch.dtype) -> Call:
    query, key = heads_last(2, 3, 17, dim, dtype), heads_last(2, 3, 17, dim, dtype, seed=1)
    return "attention_rows", (query[:, :, :1], key, dim**-0.5)


def lse(dim: int, dtype: torch.dtype) -> Call:
    last = torch.arange(124, 133)
    last[0] = -1
    return "attention_lse", (*attention(dim, dtype, 9, 133, batch=2), dim**-0.5, last)


def packed_lse(dim: int, dtype: torch.dtype) -> Call:
    return "attention_lse", (*attention(dim, dtype, 71, 133), dim**-0.5, *packed_bounds(71, 133))


def weighted(dim: int, dtype: torch.dtype) -> Call:
    query, key = attention(dim, dtype, 9, 133, batch=2)
    last, first = packed_bounds(9, 133)
    normaliser, weight = randn(2, 4, 9).abs() + 3, randn(2, 4, 9, seed=3)
    return "weighted_colsum", (query, key, dim**-0.5, last, normaliser, weight, first)


def colsum(dim: int, dtype: torch.dtype) -> Call:
    return "attention_colsum", (*attention(dim, dtype, 9, 133, batch=2), dim**-0.5)


def causal_colsum(dim: int, dtype: torch.dtype) -> Call:
    query, key = attention(dim, dtype, 71, 133)
    return "attention_colsum", (query, key, dim**-0.5, *packed_bounds(71, 133), randn(1, 4, 71).abs() + 3)


def pages(dim: int, dtype: torch.dtype, page: int = 16, first: bool = False) -> Call:
    chosen = torch.tensor([[0, 8, -1], [3, 4, 7]]).repeat(2, 1, 1)
    cache = [heads_last(2, 2, 133, dim, dtype, seed=seed) for seed in (1, 2)]
    padding = torch.tensor([0, 2]) if first else None
    return "attention_decode_sparse", (heads_last(2, 6, 1, dim, dtype), *cache, chosen, page, dim**-0.5, padding)


def bounds(dim: int, dtype: torch.dtype) -> Call:
    return "page_bounds", (heads_last(2, 2, 37, dim, dtype), 16)


def codes(dim: int, dtype: torch.dtype, bits: int = 4, group: int = 32, recent: int = 0) -> Call:
    key, value = (heads_last(2, 2, 64, dim, dtype, seed=seed) for seed in (1, 2))
    packed = kv_quant(key, bits, group, -2 if group != dim else -1), kv_quant(value, bits, dim // 4, -1)
    behind = [heads_last(2, 2, recent, dim, dtype, seed=seed) if recent else None for seed in (3, 4)]
    padding = torch.tensor([0, 65]) if recent else None
    query = heads_last(2, 6, 1, dim, dtype)
    return "attention_decode_quant", (query, *packed, bits, bits, dim**-0.5, *behind, padding)


def some_codes(dtype: torch.dtype, batch: int, kv_heads: int) -> Call:
    """The first tokens of longer caches, keys with ranges of several tokens and values with ranges of channels."""
    key, value = (randn(batch, kv_heads, 96, 64, seed=seed, dtype=dtype) for seed in (1, 2))
    keys = [part[:, :, : 64 * part.shape[2] // 96] for part in kv_quant(key, 2, 32, -2)]
    values = [part[:, :, :64] for part in kv_quant(value, 2, 32, -1)]
    return "attention_decode_quant", (randn(batch, 2 * kv_heads, 1, 64, dtype=dtype), keys, values, 2, 2, 0.1)


def compact(dtype: torch.dtype, *tail: int) -> Call:
    tensor = (9 * randn(3, 7, *tail)).to(dtype)
    return "compact", (tensor, torch.tensor([[-1, -1, 0, 6], [-1, 1, 2, 3], [0, 2, 4, 5]]))


def match(dtype: torch.dtype) -> Call:
    return "bipartite_match", (heads_last(2, 1, 131, 20, dtype)[:, 0],)


def merge(dtype: torch.dtype) -> Call:
    group = torch.randint(5, (2, 33), generator=torch.Generator().manual_seed(0))
    return "merge_tokens", ((4 * randn(2, 33, 20)).to(dtype), group, 6)  # the last one stays empty


def quant(dtype: torch.dtype, bits: int, tokens: int, channels: int, group: int, dim: int) -> Call:
    return "kv_quant", (heads_last(2, 2, tokens, channels, dtype), bits, group, dim)


def dequant(dtype: torch.dtype, bits: int, group: int, dim: int) -> Call:
    return "kv_dequant", (*kv_quant(randn(2, 21, 24, dtype=dtype), bits, group, dim), bits, dim)


def pack(bits: int) -> Call:
    return "pack_bits", (torch.randint(2**bits, (3, 5, 24), generator=torch.Generator().manual_seed(0)).byte(), bits)


def unpack(bits: int) -> Call:
    return "unpack_bits", (torch.randint(256, (3, 5, 3), generator=torch.Generator().manual_seed(0)).byte(), bits)


def greedy(dtype: torch.dtype, objective: str, pivots: bool) -> Call:
    tokens = [randn(17, 6, dtype=dtype), randn(67, 6, seed=1, dtype=dtype), randn(1, 6, dtype=dtype)]
    firsts = [torch.tensor(16), torch.tensor(0), torch.tensor(0)] if pivots else None
    return "greedy_select", (tokens, [5, 12, 1], firsts, objective)


def dpp(dtype: torch.dtype) -> Call:
    tokens = [randn(17, 40, dtype=dtype), randn(67, 40, seed=1, dtype=dtype), randn(1, 40, dtype=dtype)]
    return "dpp_select", (tokens, [0.1 + randn(len(image)).abs() for image in tokens], [5, 12, 1])


BY_HEAD_SIZE: dict[str, Callable[[int, torch.dtype], Call]] = {
    "rows": rows,
    "cls row": cls_row,
    "lse": lse,
    "weighted": weighted,
    "colsum": colsum,
    "pages": pages,
    "codes": codes,
    "bounds": bounds,
}
BY_DTYPE: dict[str, Callable[[torch.dtype], Call]] = {
    **{
        f"rows joined by {heads} and {joined}": lambda dtype, heads=heads, joined=joined: rows(20, dtype, heads, joined)
        for heads, joined in [("mean", "sum"), ("max", None), (None, "mean"), ("sum", "max"), (None, "sum")]
    },
    "row of full width": lambda dtype: cls_row(200, dtype),
    "packed rows": lambda dtype: packed_rows(20, dtype),
    "packed lse": lambda dtype: packed_lse(20, dtype),
    "causal colsum": lambda dtype: causal_colsum(20, dtype),
    "entries": lambda dtype: pages(20, dtype, page=1),
    "pages of padded rows": lambda dtype: pages(20, dtype, first=True),
    "2 bits per token": lambda dtype: codes(64, dtype, bits=2, group=64),
    "8 bits and recent entries": lambda dtype: codes(24, dtype, bits=8, group=64, recent=3),
    "codes of some tokens": lambda dtype: some_codes(dtype, 2, 3),
    "codes of one head": lambda dtype: some_codes(dtype, 2, 1),
    "codes of one row": lambda dtype: some_codes(dtype, 1, 2),
    "match": match,
    "merge": merge,
    "quant per channel": lambda dtype: quant(dtype, 4, 14, 24, 7, -2),
    "quant of all tokens": lambda dtype: quant(dtype, 2, 300, 16, 300, -2),
    "quant per token": lambda dtype: quant(dtype, 2, 21, 24, 8, -1),
    "quant of all channels": lambda dtype: quant(dtype, 8, 5, 600, 600, -1),
    "dequant per channel": lambda dtype: dequant(dtype, 4, 7, -2),
    "dequant per token": lambda dtype: dequant(dtype, 1, 12, -1),
    "max-sum": lambda dtype: greedy(dtype, "max-sum", True),
    "k-center": lambda dtype: greedy(dtype, "k-center", False),
    "dpp": dpp,
    "embeddings": lambda dtype: compact(dtype, 1100),
}
OTHERS: dict[str, Callable[[], Call]] = {
    **{f"pack {bits}": lambda bits=bits: pack(bits) for bits in (1, 2, 4, 8)},
    **{f"unpack {bits}": lambda bits=bits: unpack(bits) for bits in (1, 2, 4, 8)},
    "positions": lambda: compact(torch.int64),
    "mask": lambda: compact(torch.bool),
    "planes": lambda: compact(torch.float32, 2, 3),
    "counts": lambda: merge(torch.int64),
}


def one_of_each() -> dict[str, tuple[Any, ...]]:
    """Every op with some call."""
    calls = [make(64, torch.float32) for make in BY_HEAD_SIZE.values()]
    calls += [make(torch.float32) for make in BY_DTYPE.values()] + [make() for make in OTHERS.values()]
    return dict(reversed(calls))
