"""Ground truth: one group at a time, and bits in one long integer."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def kv_quant(states: Tensor, bits: int, group: int, dim: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, scales and offsets of `states`, with groups of neighbours in `dim`."""
    rows = states.transpose(dim, -1)
    codes = torch.full(rows.shape, 255, dtype=torch.uint8)
    scale, offset = torch.full((2, *rows.shape[:-1], rows.shape[-1] // group), float("nan"), dtype=states.dtype)
    for place in itertools.product(*map(range, scale.shape)):
        *row, number = place
        members = (*row, slice(number * group, (number + 1) * group))
        values = rows[members].float()
        scale[place] = (values.max() - values.min()) / (2**bits - 1)
        offset[place] = values.min()
        step = scale[place].float() if scale[place] > 0 else 1.0
        codes[members] = ((values - values.min()) / step).round().clamp(max=2**bits - 1).to(torch.uint8)
    return pack_bits(codes.transpose(dim, -1), bits), scale.transpose(dim, -1), offset.transpose(dim, -1)


def kv_dequant(codes: Tensor, scale: Tensor, offset: Tensor, bits: int, group: int, dim: int = -1) -> Tensor:
    """`offset + code * scale`, of the group that each code is in."""
    wide_scale, wide_offset = (part.float().repeat_interleave(group, dim) for part in (scale, offset))
    return (unpack_bits(codes, bits) * wide_scale + wide_offset).to(scale.dtype)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Every row of `codes` is an integer with digits of `bits` bits, lowest first; these are its bytes."""
    size = codes.shape[-1] * bits // 8
    packed = torch.zeros(*codes.shape[:-1], size, dtype=torch.uint8)
    for row in itertools.product(*map(range, codes.shape[:-1])):
        number = sum(code << bits * place for place, code in enumerate(codes[row].tolist()))
        packed[row] = torch.tensor(list(number.to_bytes(size, "little")), dtype=torch.uint8)
    return packed


def unpack_bits(codes: Tensor, bits: int) -> Tensor:
    """The digits of every integer."""
    count = codes.shape[-1] * 8 // bits
    unpacked = torch.zeros(*codes.shape[:-1], count, dtype=torch.uint8)
    for row in itertools.product(*map(range, codes.shape[:-1])):
        number = int.from_bytes(bytes(codes[row].tolist()), "little")
        unpacked[row] = torch.tensor([number >> bits * place & 2**bits - 1 for place in range(count)])
    return unpacked
