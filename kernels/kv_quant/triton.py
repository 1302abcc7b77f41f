"""Ranges and packed codes in one launch: a program reads a group twice, the second time from cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
ROWS = 16


@triton.jit
def round_half_even(values):
    """Exact where values are below 2^22."""
    return (values + 12582912.0) - 12582912.0


@triton.jit
def pack(codes, BITS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Codes `[rows, bytes * 8 / bits]` -> bytes `[rows, bytes]`, lowest bits first."""
    EACH: tl.constexpr = 8 // BITS
    shifts = tl.arange(0, EACH) * BITS
    return tl.sum(tl.reshape(codes, [ROWS, BYTES, EACH]) << shifts[None, None, :], 2)


@triton.jit
def _quant(
    states,
    codes,
    low,
    high,
    heads,
    tokens,
    channels,
    group,
    state_batch,
    state_head,
    state_token,
    state_channel,
    BITS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A program has some tokens and one group of channels, or one group of tokens and some channels."""
    entry = tl.program_id(2)
    states += entry // heads * state_batch + entry % heads * state_head
    codes += entry * tokens * (channels * BITS // 8)
    if PER_TOKEN:
        token, end = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tokens
        channel, channel_end = tl.program_id(1) * group + tl.arange(0, CHANNELS), (tl.program_id(1) + 1) * group
        steps = tl.cdiv(group, CHANNELS)
    else:
        token, end = tl.program_id(0) * group + tl.arange(0, TOKENS), (tl.program_id(0) + 1) * group
        channel, channel_end = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), channels
        steps = tl.cdiv(group, TOKENS)
    lowest = tl.full([TOKENS, CHANNELS], float("inf"), tl.float32)
    highest = -lowest
    for step in range(steps):
        t, c = (token, channel + step * CHANNELS) if PER_TOKEN else (token + step * TOKENS, channel)
        inside = (t < end)[:, None] & (c < channel_end)[None, :]
        place = states + t[:, None] * state_token + c[None, :] * state_channel
        values = tl.load(place, inside, float("inf")).to(tl.float32)
        lowest = tl.minimum(lowest, values)
        highest = tl.maximum(highest, tl.where(inside, values, float("-inf")))
    least, most = tl.min(lowest, 1 if PER_TOKEN else 0), tl.max(highest, 1 if PER_TOKEN else 0)
    if PER_TOKEN:
        of_group, real = (entry * tokens + token) * (channels // group) + tl.program_id(1), token < tokens
    else:
        of_group, real = (entry * (tokens // group) + tl.program_id(0)) * channels + channel, channel < channels
    tl.store(low + of_group, least, real)
    tl.store(high + of_group, most, real)
    step_size = tl.div_rn(most - least, 2**BITS - 1.0)
    step_size = tl.where(step_size == 0, 1.0, step_size)
    offset, size = (least[:, None], step_size[:, None]) if PER_TOKEN else (least[None, :], step_size[None, :])
    for step in range(steps):
        t, c = (token, channel + step * CHANNELS) if PER_TOKEN else (token + step * TOKENS, channel)
        inside = (t < end)[:, None] & (c < channel_end)[None, :]
        place = states + t[:, None] * state_token + c[None, :] * state_channel
        values = tl.load(place, inside, 0.0).to(tl.float32)
        digits = tl.where(inside, round_half_even(tl.div_rn(values - offset, size + tl.zeros_like(values))), 0.0)
        packed = pack(digits.to(tl.int32), BITS, TOKENS, CHANNELS * BITS // 8)
        byte = tl.min(c, 0) * BITS // 8 + tl.arange(0, CHANNELS * BITS // 8)
        there = (t < end)[:, None] & (byte < channel_end * BITS // 8)[None, :]
        tl.store(codes + t[:, None] * (channels * BITS // 8) + byte[None, :], packed.to(tl.uint8), there)


@triton.jit
def _dequant(
    codes,
    low,
    high,
    out,
    size,
    tokens,
    channels,
    group,
    BITS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    bit = place % channels * BITS
    line, channel = place // channels, place % channels
    byte = tl.load(codes + line * (channels * BITS // 8) + bit // 8, inside, 0).to(tl.int32)
    if PER_TOKEN:
        of_group = line * (channels // group) + channel // group
    else:
        of_group = (line // tokens * (tokens // group) + line % tokens // group) * channels + channel
    least = tl.load(low + of_group, inside, 0.0).to(tl.float32)
    most = tl.load(high + of_group, inside, 0.0).to(tl.float32)
    code = ((byte >> bit % 8) & (2**BITS - 1)).to(tl.float32)
    tl.store(out + place, code * tl.div_rn(most - least, 2**BITS - 1.0) + least, inside)


@triton.jit
def _pack(codes, out, size, BITS: tl.constexpr, BLOCK: tl.constexpr):
    EACH: tl.constexpr = 8 // BITS
    byte = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = byte[:, None] * EACH + tl.arange(0, EACH)[None, :]
    digits = tl.load(codes + place, (byte < size)[:, None], 0).to(tl.int32)
    tl.store(out + byte, tl.sum(digits << (tl.arange(0, EACH) * BITS)[None, :], 1).to(tl.uint8), byte < size)


@triton.jit
def _unpack(codes, out, size, BITS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.load(codes + place * BITS // 8, place < size, 0).to(tl.int32)
    tl.store(out + place, ((byte >> place * BITS % 8) & (2**BITS - 1)).to(tl.uint8), place < size)


def kv_quant(states: Tensor, bits: int, group: int, dim: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.kv_quant`."""
    *lead, tokens, channels = states.shape
    states = states.reshape(-1, *states.shape[-3:]) if states.dim() > 3 else states.view(1, -1, tokens, channels)
    per_token = dim == -1
    ranges = (tokens, channels // group) if per_token else (tokens // group, channels)
    codes = states.new_empty(*lead, tokens, channels * bits // 8, dtype=torch.uint8)
    low, high = states.new_empty(*lead, *ranges), states.new_empty(*lead, *ranges)
    block_channels = max(8, min(256, triton.next_power_of_2(group if per_token else channels)))
    block_tokens = ROWS if per_token else min(triton.next_power_of_2(group), 4096 // block_channels)
    across, down = triton.cdiv(tokens, block_tokens), triton.cdiv(channels, block_channels)
    _quant[
        across if per_token else tokens // group,
        channels // group if per_token else down,
        states.shape[0] * states.shape[1],
    ](
        states,
        codes,
        low,
        high,
        states.shape[1],
        tokens,
        channels,
        group,
        *states.stride(),
        BITS=bits,
        PER_TOKEN=per_token,
        TOKENS=block_tokens,
        CHANNELS=block_channels,
    )
    return codes, low, high


def kv_dequant(codes: Tensor, low: Tensor, high: Tensor, bits: int, dim: int = -1) -> Tensor:
    """See `reference.kv_dequant`."""
    tokens, channels = codes.shape[-2], codes.shape[-1] * 8 // bits
    out = low.new_empty(*codes.shape[:-1], channels)
    _dequant[(triton.cdiv(out.numel(), BLOCK),)](
        codes.contiguous(),
        low.contiguous(),
        high.contiguous(),
        out,
        out.numel(),
        tokens,
        channels,
        out.shape[dim] // low.shape[dim],
        BITS=bits,
        PER_TOKEN=dim == -1,
        BLOCK=BLOCK,
    )
    return out


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """See `reference.pack_bits`."""
    out = codes.new_empty(*codes.shape[:-1], codes.shape[-1] * bits // 8)
    _pack[(triton.cdiv(out.numel(), BLOCK),)](codes.contiguous(), out, out.numel(), BITS=bits, BLOCK=BLOCK)
    return out


def unpack_bits(codes: Tensor, bits: int) -> Tensor:
    """See `reference.unpack_bits`."""
    out = codes.new_empty(*codes.shape[:-1], codes.shape[-1] * 8 // bits)
    _unpack[(triton.cdiv(out.numel(), BLOCK),)](codes.contiguous(), out, out.numel(), BITS=bits, BLOCK=BLOCK)
    return out
