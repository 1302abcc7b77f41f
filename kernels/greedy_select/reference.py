"""Greedy diversity with one running score per token, for all images at once.

Similarities are computed for tokens that are chosen or nearly so, at worst for all pairs; beyond `HELD_BYTES` memory is
linear in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from mmcompress.kernels.greedy_select.rows import Rows


def greedy_select(
    tokens: Sequence[Tensor], counts: Sequence[int], pivots: Sequence[Tensor] | None, objective: str
) -> list[Tensor]:
    """Pick mutually dissimilar tokens of each image, starting from its pivot; indices `[count]` in order of choice.

    Args:
        tokens: `[tokens, dim]` of each image; similarity is the cosine.
        counts: how many to pick of each.
        pivots: index of the first of each; None takes the token that is least similar to its most similar other.
        objective: "max-sum" minimises the summed similarity to all chosen ones, "k-center" the largest.
    """
    if not tokens:
        return []
    unit = [normalize(image.float(), dim=-1) for image in tokens]
    rows = Rows(unit, counts)
    if pivots is None:
        pivots = [_most_isolated(rows, image) for image in range(len(unit))]
    # Minus the summed or the largest similarity to what is chosen; -inf for what is, and behind the end of an image.
    start = 0.0 if objective == "max-sum" else 2.0
    distance = pad_sequence([image.new_full((len(image),), start) for image in unit], True, -torch.inf)
    images = torch.arange(len(unit), device=distance.device)
    order = images.new_empty(len(unit), max(counts))
    order[:, 0] = torch.stack(list(pivots))
    for step in range(1, max(counts)):
        last = order[:, step - 1]
        to_last = rows.read(step, last, distance)
        distance = distance - to_last if objective == "max-sum" else torch.minimum(distance, -to_last)
        distance[images, last] = -torch.inf
        order[:, step] = distance.argmax(dim=1)
    return [chosen[:count].clone() for chosen, count in zip(order, counts, strict=True)]


def _most_isolated(rows: Rows, image: int) -> Tensor:
    """Index of the token least similar to its most similar other.

    Similarity is symmetric: each row bounds those of all other tokens, so that few have to be computed.
    """
    unit = rows.images[image]
    nearest, bound = unit.new_full((len(unit),), torch.inf), unit.new_full((len(unit),), -torch.inf)
    while bool(bound.min() <= nearest.min()):
        some, similarity = rows.compute(image, -bound)
        similarity = similarity.scatter(1, some[:, None], -torch.inf)
        bound = torch.maximum(bound, similarity.amax(dim=0))
        nearest[some] = similarity.amax(dim=1)
        bound[nearest < torch.inf] = torch.inf
    return nearest.argmin()
