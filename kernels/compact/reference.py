"""Gathering of rows in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def compact(tensor: Tensor, index: Tensor) -> Tensor:
    """Gather the rows of each batch entry that stay, in their own type.

    A packed batch is one entry, `tensor.flatten(0, 1)[None]` with an index that counts through it.

    Args:
        tensor: `[batch, length, ...]`: embeddings, positions, masks.
        index: `[batch, kept]`, which rows; -1 gives zeros.

    Returns:
        `[batch, kept, ...]`.
    """
    rows = torch.arange(index.shape[0], device=index.device)[:, None]
    taken = tensor[rows, index.clamp(min=0)]
    valid = (index >= 0).view(*index.shape, *([1] * (tensor.dim() - 2)))
    return torch.where(valid, taken, torch.zeros((), dtype=tensor.dtype, device=tensor.device))
