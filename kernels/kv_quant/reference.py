"""Group-wise asymmetric quantisation in plain torch, with codes packed into bytes.

Codes that follow each other in the last dimension are one string of bits, lowest bits first: of 2 bits each, code `4 * i`
is in the lowest bits of byte `i`; of 3 bits, eight codes fill three bytes.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor


def kv_quant(states: Tensor, bits: int, group: int, dim: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of `states`, packed, with scales and offsets: a group's smallest value has code 0, its largest the last one.

    Args:
        states: `[..., tokens, channels]`; channels must fill whole bytes.
        bits: of a code; 1, 2, 3, 4 or 8.
        group: neighbours that share a scale and an offset; divides the dimension.
        dim: where they are neighbours, -1 (per token) or -2 (per channel).

    Returns:
        Bytes `[..., tokens, channels * bits / 8]`, and twice `[..., tokens, channels]` with `dim` divided by `group`, in
        the type of `states`.
    """
    groups = _groups(states.float(), group, dim)
    low, high = groups.amin(dim, keepdim=True), groups.amax(dim, keepdim=True)
    last = 2**bits - 1
    scale = ((high - low) / last).to(states.dtype)
    steps = scale.float().masked_fill(scale == 0, 1)
    codes = ((groups - low) / steps).round().clamp(0, last).to(torch.uint8)
    return pack_bits(codes.flatten(dim - 1, dim), bits), scale.squeeze(dim), low.squeeze(dim).to(states.dtype)


def kv_dequant(codes: Tensor, scale: Tensor, offset: Tensor, bits: int, group: int, dim: int = -1) -> Tensor:
    """`[..., tokens, channels]` that `kv_quant` made these of, up to half a step, in the type of `scale`."""
    groups = _groups(unpack_bits(codes, bits).float(), group, dim)
    states = groups * scale.float().unsqueeze(dim) + offset.float().unsqueeze(dim)
    return states.flatten(dim - 1, dim).to(scale.dtype)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Bytes `[..., count * bits / 8]` of codes `[..., count]`, both uint8."""
    return _regroup(codes, bits, 8)


def unpack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes `[..., count]`, one a byte, of the bytes that `pack_bits` made of them."""
    return _regroup(codes, 8, bits)


def _regroup(digits: Tensor, bits: int, new: int) -> Tensor:
    """The same strings of bits, cut into digits of `new` bits instead of `bits`."""
    word = bits * new // gcd(bits, new)
    shifts, new_shifts = (torch.arange(0, word, width, device=digits.device) for width in (bits, new))
    words = (_groups(digits, word // bits, -1).int() << shifts.int()).sum(dim=-1, keepdim=True, dtype=torch.int32)
    return (words >> new_shifts.int() & 2**new - 1).flatten(-2).to(torch.uint8)


def _groups(states: Tensor, group: int, dim: int) -> Tensor:
    """`dim` in two: number of the group, place in it."""
    return states.unflatten(dim, (states.shape[dim] // group, group))
