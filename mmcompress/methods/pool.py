"""Average pooling to a smaller grid of the same aspect."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmcompress.budget import largest_remainder
from mmcompress.method import VisualMethod
from mmcompress.registry import register
from mmcompress.types import EncoderFacts, Needs, Selection, VisualItem


@register("pool", summary="Average pooling to the largest grid of the same aspect that fits.", family="pooling")
@dataclass(frozen=True)
class Pool(VisualMethod):
    """Average the windows of an h x w grid, h * w <= K; the count is what the aspect allows, often below the budget.

    A pooled token takes the position of its window's centre cell.
    """

    @property
    def exact_count(self) -> bool:
        """False: a grid of the right aspect rarely has as many cells as the budget."""
        return False

    def needs(self, encoder: EncoderFacts) -> Needs:
        """The embeddings, which are averaged."""
        return Needs(embeddings=True)

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Pool every plane of the item within its share of the budget."""
        sizes = [rows * columns for rows, columns in item.grids]
        device = item.embeddings.device
        anchors, weights, start = [], [], 0
        for (rows, columns), size, share in zip(item.grids, sizes, largest_remainder(budget, sizes), strict=True):
            pooled_rows, pooled_columns = pooled_grid(rows, columns, share)
            row_centres, row_weights = _windows(rows, pooled_rows, device)
            column_centres, column_weights = _windows(columns, pooled_columns, device)
            weight = torch.zeros(pooled_rows * pooled_columns, len(item), device=device)
            weight[:, start : start + size] = torch.kron(row_weights, column_weights)
            anchors.append(start + (row_centres[:, None] * columns + column_centres).flatten())
            weights.append(weight)
            start += size
        return Selection(torch.cat(anchors), torch.cat(weights))


def pooled_grid(rows: int, columns: int, budget: int) -> tuple[int, int]:
    """The largest (h, w) with h * w <= budget and the aspect of (rows, columns), the shorter side rounded."""
    short, long = sorted((rows, columns))
    best = (0, 0)
    for length in range(1, long + 1):
        breadth = max(1, (2 * length * short + long) // (2 * long))
        if best[0] * best[1] < length * breadth <= budget:
            best = (breadth, length)
    return best if rows <= columns else best[::-1]


def _windows(cells: int, windows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Centres `[windows]` and averaging weights `[windows, cells]` of adaptive pooling along one axis."""
    index = torch.arange(windows, device=device)
    cell = torch.arange(cells, device=device)
    first = index * cells // max(windows, 1)
    last = -((index + 1) * cells // -max(windows, 1))
    inside = ((cell >= first[:, None]) & (cell < last[:, None])).float()
    return (2 * index + 1) * cells // (2 * max(windows, 1)), inside / inside.sum(dim=1, keepdim=True)
