"""What merging methods share: even/odd bipartite soft matching, and a rule applied to every tile by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmcompress import ops
from mmcompress.ranking import tile_shares
from mmcompress.types import Selection


@dataclass(frozen=True)
class Matching:
    """Which tokens become one.

    Args:
        kept: `[..., outputs]`, the token whose place each output takes.
        group: `[..., tokens]`, the output that each token goes into.
    """

    kept: Tensor
    group: Tensor

    def sum(self, values: Tensor) -> Tensor:
        """Add up `values` `[..., tokens, dim]` by output, `[..., outputs, dim]`."""
        return ops.merge_tokens(values, self.group, self.kept.shape[-1])

    def mean(self, values: Tensor) -> Tensor:
        """The plain mean of `values` `[..., tokens, dim]` by output, `[..., outputs, dim]`."""
        return self.sum(values) / self.counts[..., None]

    @property
    def counts(self) -> Tensor:
        """How many tokens go into each output, `[..., outputs]`."""
        return self.sum(torch.ones_like(self.group)[..., None])[..., 0]


def soft_match(metric: Tensor, count: int, protected: int = 0) -> Matching:
    """Match `count` tokens at even places with the most similar ones at odd places (ToMe, Section 3).

    Outputs come in the order of the published codes: tokens of even places that stay, by falling similarity to their
    match (in their own order if some are protected), then all of odd places. Matched tokens take the place of the odd
    one.

    Args:
        metric: `[..., tokens, dim]`, compared by cosine.
        count: how many are merged away, at most all tokens of even places that are not protected.
        protected: so many tokens at the front are never merged into others (a CLS token).
    """
    places = torch.arange(metric.shape[-2], device=metric.device)
    even, odd = places[::2], places[1::2]
    best, nearest = ops.bipartite_match(metric)
    best = best.masked_fill(even < protected, -torch.inf)
    ranked = best.argsort(dim=-1, descending=True, stable=True)
    merged, staying = ranked[..., :count], ranked[..., count:]
    if protected:
        staying = staying.sort(dim=-1).values
    kept = torch.cat([even[staying], odd.expand(*best.shape[:-1], -1)], dim=-1)
    group = torch.empty(metric.shape[:-1], dtype=torch.long, device=metric.device)
    group.scatter_(-1, kept, torch.arange(kept.shape[-1], device=metric.device).expand(kept.shape))
    group.scatter_(-1, even[merged], staying.shape[-1] + nearest.gather(-1, merged))
    return Matching(kept, group)


def merge_by_tile(tiles: Tensor, budget: int, rule: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> Selection:
    """Merge every tile by itself, with `budget` shared over the tiles in proportion to their tokens, exactly.

    Args:
        tiles: `[tokens]`, the tile of each token.
        budget: outputs in all.
        rule: given the indices of a tile's tokens, ascending, and its share (at least 1), the places among them of its
            outputs and their weights `[outputs, members]`.
    """
    anchors, weights = [], []
    for members, share in tile_shares(tiles, budget):
        anchor, among = rule(members, share)
        weight = torch.zeros(len(anchor), len(tiles), device=tiles.device)
        weight[:, members] = among
        anchors.append(members[anchor])
        weights.append(weight)
    return Selection(torch.cat(anchors), torch.cat(weights))


def in_raster_order(selection: Selection) -> Selection:
    """The selection with its outputs ordered by their places."""
    return in_order(selection, selection.anchor.argsort())


def in_order(selection: Selection, order: Tensor) -> Selection:
    """The selection with its outputs in `order` `[outputs]`."""
    weight = selection.weight
    return Selection(selection.anchor[order], None if weight is None else weight[order])
