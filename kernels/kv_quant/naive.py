"""Ground truth: one group at a time, and bits in one long integer."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def kv_quant(states: Tensor, bits: int, group: int, dim: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes of `states`, lowest and highest values of groups of neighbours in `dim`."""
    rows = states.transpose(dim, -1)
    codes = torch.full(rows.shape, 255, dtype=torch.uint8)
    low, high = torch.full((2, *rows.shape[:-1], rows.shape[-1] // group), float("nan"), dtype=states.dtype)
    for place in itertools.product(*map(range, low.shape)):
        members: tuple[int | slice, ...] = (*place[:-1], slice(place[-1] * group, (place[-1] + 1) * group))
        values = rows[members].float()
        low[place], high[place] = values.min(), values.max()
        step = (values.max() - values.min()) / (2**bits - 1)
        codes[members] = ((values - values.min()) / step).round().to(torch.uint8) if step > 0 else 0
    return pack_bits(codes.transpose(dim, -1), bits), low.transpose(dim, -1), high.transpose(dim, -1)


def kv_dequant(codes: Tensor, low: Tensor, high: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Codes divide the range of the group they are in."""
    states = unpack_bits(codes, bits)
    group = states.shape[dim] // low.shape[dim] if states.numel() else 1
    low, high = (end.repeat_interleave(group, dim) for end in (low, high))
    return (states * ((high.float() - low) / (2**bits - 1)) + low).to(low.dtype)


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
