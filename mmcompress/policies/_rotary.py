"""Rotary positions: the first half of every head's dimensions is turned against the second."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(states: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn `[..., tokens, dim]` to positions, given their cosines and sines `[tokens, dim]`."""
    cosine, sine = rotation
    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat((-second, first), dim=-1) * sine


def unrotate(states: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn back what `rotate` turned."""
    cosine, sine = rotation
    return rotate(states, (cosine, -sine)) / (cosine**2 + sine**2)
