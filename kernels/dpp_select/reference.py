"""Greedy MAP of a determinantal point process by an incremental Cholesky factor, for all images at once.

The kernel's rows are computed for tokens that are chosen or nearly so, at worst for all; beyond `HELD_BYTES` of them
memory is O(tokens * count).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from mmcompress.kernels.greedy_select.rows import Rows

_FLOOR = 1e-12


def dpp_select(tokens: Sequence[Tensor], relevance: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Pick tokens of each image that span as much volume as possible; indices `[count]` in order of choice.

    Beyond the rank of the tokens nothing is left to span, and what is picked is a matter of rounding.

    Args:
        tokens: `[tokens, dim]` of each image; similarity is the cosine.
        relevance: `[tokens]` of each, not negative; scales the vector of each token.
        counts: how many to pick of each.
    """
    if not tokens:
        return []
    unit = [normalize(image.float(), dim=-1) for image in tokens]
    rows = Rows(unit, counts)
    scale = pad_sequence([values.float() for values in relevance], True)
    # Squared length that the chosen ones do not explain; a sum of squares would break ties by its rounding.
    present = [vector_norm(image, dim=-1) > 0 for image in unit]
    lengths = [some * values.float().square() for some, values in zip(present, relevance, strict=True)]
    left = pad_sequence([length.clamp(min=_FLOOR) for length in lengths], True, -torch.inf)
    images = torch.arange(len(unit), device=left.device)
    order = images.new_empty(len(unit), max(counts))
    # Row s: each vector's part along the s-th chosen direction.
    explained = left.new_zeros(len(unit), max(counts), left.shape[1])
    for step in range(max(counts)):
        order[:, step] = chosen = left.argmax(dim=1)
        known = explained[images, :step, chosen]
        along = scale[images, chosen, None] * scale * rows.read(step, chosen, left)
        along = along - (known[:, None] @ explained[:, :step])[:, 0]
        # No part is longer than what is left: past the rank, rounding errors would otherwise grow without bound.
        longest = left.clamp(min=0).sqrt()
        explained[:, step] = torch.clamp(along / longest[images, chosen, None], -longest, longest)
        left[images, chosen] = -torch.inf
        left = torch.where(left.isinf(), left, (left - explained[:, step].square()).clamp(min=_FLOOR))
    return [chosen[:count].clone() for chosen, count in zip(order, counts, strict=True)]
