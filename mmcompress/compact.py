"""Removing tokens from ragged, padded batches."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress import ops


def ragged_index(keep: Tensor, pad_left: bool) -> Tensor:
    """Source positions of the kept columns of each row, `[batch, longest]`, ascending, -1 where padded.

    Args:
        keep: `[batch, length]` bool.
        pad_left: whether shorter rows are padded on the left.
    """
    counts = keep.sum(dim=1, keepdim=True)
    longest = int(counts.max())
    columns = torch.argsort(~keep, dim=1, stable=True)[:, :longest]
    slot = torch.arange(longest, device=keep.device)
    if pad_left:
        columns = columns.gather(1, (slot - (longest - counts)) % max(longest, 1))
        return columns.masked_fill(slot < longest - counts, -1)
    return columns.masked_fill(slot >= counts, -1)


def ragged_origin(keep: Tensor, source: Tensor, pad_left: bool) -> tuple[Tensor, Tensor]:
    """`ragged_index` of `keep`, and the same where the kept columns are filled from those in `source`."""
    index = ragged_index(keep, pad_left)
    return index, torch.where(index >= 0, source.gather(1, index.clamp(min=0)), index)


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Gather `tensor` `[batch, length, ...]` by `index` `[batch, kept]`; -1 gives zeros."""
    return ops.compact(tensor, index)


def spread(tensor: Tensor, keep: Tensor, index: Tensor) -> Tensor:
    """Undo `take` `[batch, kept, dim]` -> `[batch, length, dim]`: a removed position repeats the kept one before it.

    The repetition keeps next-token losses right: the last token before a removed stretch predicts the one after it.
    """
    before = (keep.cumsum(dim=1) - 1).clamp(min=0)
    padding = (index < 0).sum(dim=1, keepdim=True)
    leading = torch.where(index[:, :1] < 0, padding, 0)
    rows = torch.arange(index.shape[0], device=index.device)[:, None]
    return tensor[rows, (leading + before).clamp(max=index.shape[1] - 1)]


def take_positions(positions: Tensor, index: Tensor) -> Tensor:
    """Gather position ids `[..., batch, length]` by `index` `[batch, kept]`."""
    index = index.clamp(min=0).expand(*positions.shape[:-2], *index.shape)
    return ops.compact(positions.flatten(0, -2), index.flatten(0, -2)).view(index.shape)


def renumber(positions: Tensor, current: Tensor, kept: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous ids for the kept tokens, and `[batch]` by how much all later ids must be moved back."""
    text = positions[-3:] if positions.dim() == 3 else positions[None]
    limit = torch.iinfo(text.dtype)
    first = text.masked_fill(~current, limit.max).amin(dim=(0, 2))
    last = text.masked_fill(~current, limit.min).amax(dim=(0, 2))
    renumbered = first[:, None] + (valid.cumsum(dim=1) - 1).clamp(min=0)
    shift = last - renumbered.amax(dim=1)
    return renumbered.expand_as(kept), shift.masked_fill(~current.any(dim=1), 0)
