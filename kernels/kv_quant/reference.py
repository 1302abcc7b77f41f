"""Group-wise asymmetric quantisation in plain torch, with codes packed into bytes.

Codes that follow each other in the last dimension are one string of bits, lowest bits first: of 2 bits each, code
`4 * i` is in the lowest bits of byte `i`; of 3 bits, eight codes fill three bytes.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor


def kv_quant(states: Tensor, bits: int, group: int, dim: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of `states`, packed, and the range of every group, whose ends have the first and the last code.

    The ends are held rather than a scale and an offset: they need no rounding, as they are among `states`.

    Args:
        states: `[..., tokens, channels]`; channels must fill whole bytes.
        bits: of a code; 1, 2, 3, 4 or 8.
        group: neighbours that share a range; divides the dimension.
        dim: where they are neighbours, -1 (per token) or -2 (per channel).

    Returns:
        Bytes `[..., tokens, channels * bits / 8]`; lowest and highest values, `[..., tokens, channels]` with `dim`
        divided by `group`, in the type of `states`.
    """
    groups = _groups(states, group, dim)
    low, high = groups.aminmax(dim=dim)
    offset, step = _steps(low, high, bits, dim)
    codes = ((groups - offset) / step.masked_fill(step == 0, 1)).round().to(torch.uint8)
    return pack_bits(codes.flatten(dim - 1, dim), bits), low, high


def kv_dequant(codes: Tensor, low: Tensor, high: Tensor, bits: int, dim: int = -1) -> Tensor:
    """`[..., tokens, channels]` that `kv_quant` made these of, up to half a step, in the type of `low`."""
    states = unpack_bits(codes, bits)
    offset, step = _steps(low, high, bits, dim)
    groups = _groups(states, states.shape[dim] // max(low.shape[dim], 1), dim)
    return (groups * step + offset).flatten(dim - 1, dim).to(low.dtype)


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


def _steps(low: Tensor, high: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """What code 0 stands for, and how far codes are apart, in float32."""
    offset = low.float().unsqueeze(dim)
    return offset, (high.float().unsqueeze(dim) - offset) / (2**bits - 1)


def _groups(states: Tensor, group: int, dim: int) -> Tensor:
    """`dim` in two: number of the group, place in it."""
    return states.unflatten(dim, (states.shape[dim] // max(group, 1), group))
