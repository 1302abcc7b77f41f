"""What quantisers share: groups of neighbours with a range of their own, codes packed into bytes."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mmcompress import ops
from mmcompress.errors import SpecError
from mmcompress.kv_policy import Block, Packed, Quantiser

PER_TOKEN, PER_CHANNEL = -1, -2


def pack_groups(name: str, block: Block, bits: int, group: int, dim: int) -> Packed:
    """Codes and ranges of groups along `dim`, see `ops.kv_quant`, for the policy called `name`.

    Raises:
        SpecError: the block does not divide into groups or bytes.
    """
    states = block.states
    check_bytes(name, states.shape[-1], bits)
    if states.shape[dim] % group:
        what = "channels of a head" if dim == PER_TOKEN else "tokens"
        raise SpecError(f"{name}: {states.shape[dim]} {what} do not divide into groups of {group}.")
    parts = ops.kv_quant(states, bits, group, dim)
    return Packed(parts, states.shape, states.dtype, block.layer, along=(-2, -2, -2))


def unpack_groups(packed: Packed, bits: int, dim: int) -> Tensor:
    """What `pack_groups` packed, up to half a step."""
    codes, low, high = packed.parts
    return ops.kv_dequant(codes, low, high, bits, dim)


def check_bytes(name: str, channels: int, bits: int) -> None:
    """See that the codes of one token's `channels` fill whole bytes.

    Raises:
        SpecError: they do not.
    """
    if channels * bits % 8:
        raise SpecError(f"{name}: {channels} channels of {bits} bits each do not fill whole bytes.")


class PerToken(Quantiser):
    """Every token has a range per KV head."""

    bits: ClassVar[int]

    @property
    def code_bits(self) -> int:
        """Those of keys and values."""
        return self.bits

    def pack_keys(self, block: Block) -> Packed:
        """Codes and ranges."""
        return pack_groups(self.info.name, block, self.bits, block.states.shape[-1], PER_TOKEN)

    def pack_values(self, block: Block) -> Packed:
        """Codes and ranges."""
        return self.pack_keys(block)

    def unpack_keys(self, packed: Packed) -> Tensor:
        """Codes in their ranges."""
        return unpack_groups(packed, self.bits, PER_TOKEN)

    def unpack_values(self, packed: Packed) -> Tensor:
        """Codes in their ranges."""
        return self.unpack_keys(packed)
