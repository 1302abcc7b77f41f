"""ZipCache: tokens that few queries attend to are held in fewer bits than the others."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmcompress import ops
from mmcompress.errors import SpecError
from mmcompress.kv_policy import Block, KVNeeds, KVRow, Packed, Quantiser
from mmcompress.policies._groups import PER_CHANNEL, PER_TOKEN, check_bytes
from mmcompress.registry import register_policy


@register_policy(
    "zipcache",
    summary="Keys per channel and values per token, in 4 bits for tokens that probes attend to, in 2 for others.",
    family="mixed-precision quantisation",
    stage="kv",
    paper="ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification, arXiv:2405.14256",
    licence="MIT",
    takes_keep=False,
)
@dataclass(frozen=True)
class ZipCache(Quantiser):
    """A few probe queries tell which tokens are salient; others get fewer bits (Section 4).

    The prompt is packed whole, what is generated in blocks that are packed once; the authors' code packs all of it
    again with every block.

    Args:
        high_bits: of salient tokens.
        low_bits: of the others.
        low_ratio: how many are others, per KV head, as a fraction.
        recent: the last queries that are probes, as a fraction.
        random: earlier ones, drawn with replacement, likewise.
        block: so many tokens that were generated are packed at once.
        seed: of the draw.
        compat: "official" divides what a token of the prompt receives by how many tokens follow, as the authors' code
            does, not by how many probes do, as the paper does.
    """

    high_bits: Literal[4, 8] = 4
    low_bits: Literal[2, 4] = 2
    low_ratio: float = 0.4
    recent: float = 0.05
    random: float = 0.05
    block: int = 100
    seed: int = 0
    compat: Literal["none", "official"] = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.low_ratio <= 1 or not 0 < self.recent <= 1 or not 0 <= self.random <= 1:
            raise SpecError("zipcache: low_ratio and random must be fractions in [0, 1], recent one in (0, 1].")
        if self.block < 1:
            raise SpecError(f"zipcache: block={self.block} must be at least 1.")

    def needs(self) -> KVNeeds:
        """All queries, as probes may be anywhere."""
        return KVNeeds(queries="all", steps=True)

    def probes(self, row: KVRow) -> Tensor:
        """Which queries are probes: the most recent ones, and a draw from the seed and the layer of the others."""
        assert row.query is not None
        queries = row.query.shape[1]
        earlier = queries - ceil(self.recent * queries)
        generator = torch.Generator().manual_seed(self.seed * row.layers + row.layer)
        drawn = torch.rand(int(self.random * queries), generator=generator) * earlier
        return torch.cat([torch.arange(earlier, queries), drawn.long()]).to(row.key.device)

    def saliency(self, row: KVRow) -> Tensor:
        """What each entry receives from the probes that see it, on average."""
        assert row.query is not None
        probes = self.probes(row)
        last_seen, entries = row.last_seen[probes], torch.arange(row.entries, device=row.key.device)
        received = ops.attention_rows(row.query[None, :, probes], row.key[None], row.scaling, last_seen, rows="sum")[0]
        seen_by = (last_seen[:, None] >= entries).sum(dim=0)
        if self.compat == "official" and not row.generated:
            seen_by = row.entries - entries
        return row.grouped(received).sum(dim=1) / seen_by.clamp(min=1)

    def pack_keys(self, block: Block) -> Packed:
        """A range per channel and class of tokens."""
        return self._pack(block, block.states, PER_CHANNEL)

    def pack_values(self, block: Block) -> Packed:
        """A range per token, over channels that were made comparable."""
        scale = block.states.abs().amax(dim=-2, keepdim=True).sqrt()
        return self._pack(block, block.states / scale.masked_fill(scale == 0, 1), PER_TOKEN, scale)

    def unpack_keys(self, packed: Packed) -> Tensor:
        """Codes in the ranges of their channels."""
        return self._unpack(packed, PER_CHANNEL)

    def unpack_values(self, packed: Packed) -> Tensor:
        """Codes in the ranges of their tokens, channels as they were."""
        return self._unpack(packed, PER_TOKEN) * packed.parts[-1]

    def _pack(self, block: Block, states: Tensor, dim: int, *more: Tensor) -> Packed:
        """Both classes, with the channels of all heads in one row; which tokens are salient; and what else there is."""
        assert block.saliency is not None
        heads, tokens, channels = block.states.shape[-3:]
        check_bytes("zipcache", heads * channels, self.low_bits)
        low = int(self.low_ratio * tokens)
        lowest = block.saliency.argsort(dim=-1, stable=True)[..., :low]
        salient = torch.ones_like(block.saliency, dtype=torch.uint8).scatter(-1, lowest, 0)
        ordered = states.take_along_dim(_salient_first(salient), dim=-2).transpose(-3, -2).flatten(-2)
        parts = [
            part
            for of_class, bits in zip(ordered.split([tokens - low, low], dim=-2), self._bits, strict=True)
            for part in ops.kv_quant(of_class, bits, max(of_class.shape[dim], 1), dim)
        ]
        marks = ops.pack_bits(pad(salient, (0, -tokens % 8)), 1)
        return Packed((*parts, marks, *more), block.states.shape, block.states.dtype, block.layer)

    def _unpack(self, packed: Packed, dim: int) -> Tensor:
        heads, tokens, channels = packed.shape[-3:]
        of_classes = zip((packed.parts[:3], packed.parts[3:6]), self._bits, strict=True)
        ordered = torch.cat(
            [ops.kv_dequant(codes, least, most, bits, dim) for (codes, least, most), bits in of_classes], dim=-2
        )
        by_head = ordered.unflatten(-1, (heads, channels)).transpose(-3, -2)
        salient = ops.unpack_bits(packed.parts[6], 1)[..., :tokens]
        return by_head.take_along_dim(_salient_first(salient).argsort(dim=-2), dim=-2)

    @property
    def _bits(self) -> tuple[int, int]:
        return self.high_bits, self.low_bits


def _salient_first(salient: Tensor) -> Tensor:
    """The order `[..., tokens, 1]` that puts salient tokens in front of the others."""
    return salient.argsort(dim=-1, descending=True, stable=True)[..., None]
