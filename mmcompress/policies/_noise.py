"""Noise as a pure function of what it is for, so that it is the same in every pass, batch and order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BITS = 0xFFFFFFFF


def gumbel(counters: Sequence[int | Tensor]) -> Tensor:
    """Standard Gumbel noise in float32 for every combination of the `counters`, integers that broadcast."""
    state = torch.zeros((), dtype=torch.long)
    for counter in counters:
        state = _mix((state + counter) & _BITS)
    # 23 bits: with more, the largest would round to 1 and the noise be infinite.
    uniform = ((state >> 9).float() + 0.5) / 2**23
    return -torch.log(-torch.log(uniform))


def _mix(state: Tensor) -> Tensor:
    """A 32-bit number whose every bit depends on all bits of `state`; products stay below 2**63."""
    for _ in range(2):
        state = ((state >> 16) ^ state) * 0x45D9F3B & _BITS
    return (state >> 16) ^ state
