"""Ground truth: image by image, every step takes the token with which the chosen ones span the largest volume."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dpp_select(tokens: Sequence[Tensor], relevance: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Indices `[count]` of each image in order of choice; volumes vanish beyond the rank of its tokens."""
    return [_select(*image) for image in zip(tokens, relevance, counts, strict=True)]


def _select(tokens: Tensor, relevance: Tensor, count: int) -> Tensor:
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
    cosine = (unit @ unit.T).diagonal_scatter(unit.any(dim=-1).double())  # 1 to itself, without rounding
    kernel = relevance.double()[:, None] * cosine * relevance.double()
    chosen: list[int] = []
    while len(chosen) < count:
        candidates = [i for i in range(len(tokens)) if i not in chosen]
        volumes = [torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]) for i in candidates]
        chosen.append(candidates[int(torch.stack(volumes).argmax())])
    return torch.tensor(chosen, dtype=torch.long)
