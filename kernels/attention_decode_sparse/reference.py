"""Sparse decode attention in plain torch: chosen rows are gathered first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def attention_decode_sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    page: int,
    scaling: float,
    first_key: Tensor | None = None,
) -> Tensor:
    """Attention of one new token over chosen pages of a cache (Quest), or over single entries (TidalDecode).

    Args:
        query: `[batch, heads, 1, dim]`.
        key: `[batch, kv_heads, entries, dim]`; kv_heads divides heads (GQA).
        value: likewise.
        pages: `[batch, kv_heads, count]`, numbers of pages, none twice; -1 for none. At least one entry must be seen.
        page: entries of a page; the last page may have fewer.
        scaling: factor on the logits.
        first_key: `[batch]`, the first entry that is no padding; 0 if it is None.

    Returns:
        `[batch, heads, 1, dim]` in the type of `query`.
    """
    entries = (pages[..., None] * page + torch.arange(page, device=pages.device)).flatten(2)
    hidden = (pages < 0).repeat_interleave(page, dim=2) | (entries >= key.shape[2])
    if first_key is not None:
        hidden |= entries < first_key[:, None, None]
    rows = entries.clamp(0, key.shape[2] - 1)[..., None].expand(-1, -1, -1, key.shape[3])
    return attend(query, key.gather(2, rows), value.gather(2, rows), hidden, scaling)


def attend(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scaling: float) -> Tensor:
    """Attention computed in float32; `hidden` `[batch, kv_heads, entries]` are not seen."""
    heads = query[:, :, 0].unflatten(1, (key.shape[1], -1)).float()
    logits = (heads @ key.float().mT * scaling).masked_fill(hidden[:, :, None], -torch.inf)
    return (logits.softmax(dim=-1) @ value.float()).view(query.shape).to(query.dtype)


def page_bounds(key: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest key of every page, by channel (Quest); each `[batch, kv_heads, pages, dim]`.

    When a cache grows only its last page changes: give that page's keys alone.

    Args:
        key: `[batch, kv_heads, entries, dim]`, rotated to positions.
        page: entries of a page; the last page may have fewer.
    """
    missing = -key.shape[2] % page
    filled = (pad(key, (0, 0, 0, missing), value=end).unflatten(2, (-1, page)) for end in (torch.inf, -torch.inf))
    low, high = filled
    return low.amin(dim=3), high.amax(dim=3)
