"""Ground truth: one head at a time, over the entries of its pages."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def attention_decode_sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    page: int,
    scaling: float,
    first_key: Tensor | None = None,
) -> Tensor:
    """Softmax over what is on the chosen pages, times its values."""
    group = query.shape[1] // key.shape[1]
    out = torch.full(query.shape, float("nan"))
    for b, h in itertools.product(*map(range, query.shape[:2])):
        first = 0 if first_key is None else int(first_key[b])
        chosen = {number for number in pages[b, h // group].tolist() if number >= 0}
        seen = [entry for entry in range(first, key.shape[2]) if entry // page in chosen]
        logits = key[b, h // group, seen].float() @ query[b, h, 0].float() * scaling
        out[b, h, 0] = logits.softmax(dim=0) @ value[b, h // group, seen].float()
    return out.to(query.dtype)


def page_bounds(key: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each channel on each page."""
    pages = key.split(page, dim=2)
    low, high = ([getattr(part, end)(dim=2) for part in pages] for end in ("amin", "amax"))
    return torch.stack(low, dim=2), torch.stack(high, dim=2)
