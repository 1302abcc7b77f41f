"""Greedy selections as their formulas say: image by image, each over the full matrix of its tokens' similarities."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmcompress.method import VisualMethod
from mmcompress.ranking import choose_per_tile
from mmcompress.registry import METHODS
from mmcompress.spec import Spec
from mmcompress.types import Needs, VisualItem

PlainLoop = Callable[[VisualItem, int, Needs], Tensor]
"""From an item, its budget and its method's needs to the kept indices, in any order."""


def todre(item: VisualItem, budget: int, needs: Needs, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """From the token of the thumbnail (of a plain image: of all) that CLS attends to most."""
    attention = item.cls_rows[needs.cls_rows[-1]].mean(dim=-1)
    pivot = int(torch.where(item.tiles == 0, attention, -torch.inf).argmax())
    return _least_similar(_similarities(item.embeddings), pivot, budget, join)


def divprune(item: VisualItem, budget: int, needs: Needs) -> Tensor:
    """From the token farthest from its nearest other one."""
    similarity = _similarities(item.embeddings).fill_diagonal_(-torch.inf)
    return _least_similar(similarity, int(similarity.amax(dim=1).argmin()), budget, torch.maximum)


def cdpruner(item: VisualItem, budget: int, needs: Needs) -> Tensor:
    """The greedy determinantal point process of each tile, every token equally relevant."""
    return choose_per_tile(
        item.tiles, budget, lambda members, share: _spanning(_similarities(item.embeddings[members]), share)
    )


PLAIN: dict[str, PlainLoop] = {
    "cdpruner(relevance=constant)": cdpruner,
    "divprune": divprune,
    "todre": partial(todre, join=torch.add),
    "todre(objective=k-center)": partial(todre, join=torch.maximum),
}
"""The plain loop of every method whose selection is sequential, by spec."""


def plain_loop(method: VisualMethod) -> PlainLoop | None:
    """The plain loop that answers as `method` does, if there is one."""
    for text, loop in PLAIN.items():
        spec = Spec.parse(text)
        if METHODS.build(spec.name, spec.options) == method:
            return loop
    return None


def _similarities(tokens: Tensor) -> Tensor:
    unit = normalize(tokens.float(), dim=-1)
    return unit @ unit.T


def _least_similar(similarity: Tensor, first: int, count: int, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Add the token least similar to all chosen ones, their similarities joined by sum or maximum, until `count`."""
    chosen, closeness = [first], similarity[first].clone()
    while len(chosen) < count:
        closeness[chosen[-1]] = torch.inf
        chosen.append(int(closeness.argmin()))
        closeness = join(closeness, similarity[chosen[-1]])
    return torch.tensor(chosen, device=similarity.device)


def _spanning(kernel: Tensor, count: int) -> Tensor:
    """Add the token with most length outside the span of the chosen ones, by rows of a Cholesky factor."""
    chosen: list[int] = []
    left, rows = kernel.diagonal().clone(), kernel.new_zeros(count, len(kernel))
    for step in range(count):
        chosen.append(new := int(left.argmax()))
        rows[step] = (kernel[new] - rows[:step, new] @ rows[:step]) / left[new].sqrt()
        left -= rows[step].square()
        left[new] = -torch.inf
    return torch.tensor(chosen, device=kernel.device)
