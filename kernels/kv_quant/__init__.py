"""Quantisation of keys and values in groups, and codes of a few bits packed into bytes."""

from __future__ import annotations

from torch import Tensor

from mmcompress.kernels.dispatch import FLOATS, dispatched
from mmcompress.kernels.kv_quant import reference


def _refuse_states(states: Tensor, bits: int, group: int, dim: int = -1) -> str:
    if states.dtype not in FLOATS:
        return f"dtype {states.dtype}"
    if dim == -1 and group * bits % 8:
        return f"groups of {group} codes of {bits} bits, which do not fill whole bytes"
    return refuse_bits(bits)


def _refuse_codes(codes: Tensor, low: Tensor, high: Tensor, bits: int, dim: int = -1) -> str:
    return refuse_bits(bits)


def refuse_bits(bits: int) -> str:
    """What is wrong where codes lie across bytes."""
    return f"codes of {bits} bits, which lie across bytes" if 8 % bits else ""


def _refuse_packing(codes: Tensor, bits: int) -> str:
    return refuse_bits(bits)


def _fake_quant(states: Tensor, bits: int, group: int, dim: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    *lead, tokens, channels = states.shape
    ranges = (tokens, channels // group) if dim == -1 else (tokens // group, channels)
    codes = states.new_empty(*lead, tokens, channels * bits // 8).byte()
    return codes, states.new_empty(*lead, *ranges), states.new_empty(*lead, *ranges)


def _fake_dequant(codes: Tensor, low: Tensor, high: Tensor, bits: int, dim: int = -1) -> Tensor:
    return low.new_empty(*codes.shape[:-1], codes.shape[-1] * 8 // bits)


def _fake_pack(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], codes.shape[-1] * bits // 8)


def _fake_unpack(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], codes.shape[-1] * 8 // bits)


kv_quant = dispatched(__name__, reference.kv_quant, _fake_quant, _refuse_states)
kv_dequant = dispatched(__name__, reference.kv_dequant, _fake_dequant, _refuse_codes)
pack_bits = dispatched(__name__, reference.pack_bits, _fake_pack, _refuse_packing)
unpack_bits = dispatched(__name__, reference.unpack_bits, _fake_unpack, _refuse_packing)
