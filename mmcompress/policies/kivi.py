"""KIVI: keys in few bits per channel, values per token, the most recent ones as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mmcompress.errors import SpecError
from mmcompress.kv_policy import Block, Packed, Quantiser
from mmcompress.policies._groups import PER_CHANNEL, PER_TOKEN, pack_groups, unpack_groups
from mmcompress.registry import register_policy


@register_policy(
    "kivi",
    summary="Keys in 2 or 4 bits per channel, values per token, the most recent ones in full.",
    family="quantisation",
    stage="kv",
    paper="KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, arXiv:2402.02750",
    licence="MIT",
    takes_keep=False,
)
@dataclass(frozen=True)
class KIVI(Quantiser):
    """A few channels of the keys have large values at all tokens: they get ranges of their own (Section 3).

    Args:
        bits: of a key or value.
        group: tokens (keys) or channels (values) that share a range.
        residual: how many recent values are in full; of keys there are fewer, as they are packed so many at a time.
    """

    bits: Literal[2, 4] = 2
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        if self.group < 1 or self.residual < 1 or self.residual % self.group:
            raise SpecError(
                f"kivi: residual={self.residual} must be a multiple of group={self.group}, both at least 1."
            )

    @property
    def code_bits(self) -> int:
        """Those of keys and values."""
        return self.bits

    def keys_due(self, held: int, prompt: bool) -> int:
        """Whole blocks of `residual`, so that groups of tokens are complete."""
        return held - held % self.residual

    def values_due(self, held: int, prompt: bool) -> int:
        """All but `residual`."""
        return max(held - self.residual, 0)

    def pack_keys(self, block: Block) -> Packed:
        """Groups of tokens, per channel."""
        return pack_groups("kivi", block, self.bits, self.group, PER_CHANNEL)

    def pack_values(self, block: Block) -> Packed:
        """Groups of channels, per token."""
        return pack_groups("kivi", block, self.bits, self.group, PER_TOKEN)

    def unpack_keys(self, packed: Packed) -> Tensor:
        """Codes in the ranges of their channels."""
        return unpack_groups(packed, self.bits, PER_CHANNEL)

    def unpack_values(self, packed: Packed) -> Tensor:
        """Codes in the ranges of their tokens."""
        return unpack_groups(packed, self.bits, PER_TOKEN)
