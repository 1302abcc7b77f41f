"""GlobalCom2: the thumbnail commands how densely each crop is kept, and helps to choose what of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate, one_hot

from mmcompress.errors import SpecError
from mmcompress.method import VisualMethod
from mmcompress.methods._anyres import plane_grids, thumbnail_cells, tile_sizes, top_of_every_tile
from mmcompress.ranking import top_indices_per_tile
from mmcompress.registry import register
from mmcompress.types import EncoderFacts, Needs, Selection, VisualItem

EPSILON = 1e-8  # where one crop takes it all, it tells int(252.0) from the authors' int(251.999...)


@register(
    "globalcom2",
    summary="Retention of every crop by the thumbnail's CLS logits, tokens by those of the crop and the thumbnail.",
    family="CLS-guided",
    paper="Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large "
    "Vision-Language Models, arXiv:2501.05179",
    licence="Apache-2.0",
)
@dataclass(frozen=True)
class GlobalCom2(VisualMethod):
    """Keep crops the more densely the more CLS looks at their part of the thumbnail (Section 3).

    Attention is read before the softmax, in the encoder's last layer, averaged over heads. Planes of items that are
    not tiled share the budget by size and keep their own highest logits.

    Args:
        temperature: of the softmax over crops, above 0.
        compat: "official" orders tokens as the authors' code does: the thumbnail's by descending logit, and those of
            crops as if the tokens that un-padding left of a crop filled it from its first row on. Newline tokens stay
            after the picture's true rows: in transformers padding is removed in any case, so the newlines that the
            authors' code puts after rows of padding are not there.
    """

    temperature: float = 10.0
    compat: Literal["none", "official"] = "none"

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise SpecError(f"globalcom2: temperature={self.temperature} must be above 0.")

    def needs(self, encoder: EncoderFacts) -> Needs:
        """CLS logits of the last layer, used by the LLM or not."""
        return Needs(cls_logits=(encoder.depth - 1,))

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Keep the highest scores of every tile, in raster order."""
        if item.crops is None:
            return Selection(top_indices_per_tile(_logits(item, needs), item.tiles, budget))
        scores = self.scores(item, needs)
        kept = top_of_every_tile(scores, item.tiles, self.shares(item, budget, needs))
        return Selection(_in_official_order(kept, item, scores) if self.compat == "official" else kept)

    def densities(self, item: VisualItem, needs: Needs) -> Tensor:
        """How densely each tile is kept, `[1 + crops]`: 1 for the thumbnail, 1 + p_j - mean(p) for crop j."""
        assert item.crops is not None
        crop_rows, crop_columns = item.crops
        row, column = thumbnail_cells(item)
        cell_row = (row // max(row.numel() // crop_rows, 1)).clamp(max=crop_rows - 1)
        cell_column = (column // max(column.numel() // crop_columns, 1)).clamp(max=crop_columns - 1)
        cell = (cell_row * crop_columns + cell_column).flatten()
        logits = _logits(item, needs)[item.tiles == 0].cpu().double()
        totals = logits.new_zeros(crop_rows * crop_columns).index_add(0, cell, logits)
        attention = torch.exp((totals - totals.max()) / self.temperature)
        attention = attention / (attention.sum() + EPSILON)
        return torch.cat([attention.new_ones(1), 1 + attention - attention.mean()])

    def shares(self, item: VisualItem, budget: int, needs: Needs) -> Tensor:
        """Tokens kept of each tile, `[1 + crops]`: int(tokens * min(1, ratio * density)).

        The ratio is the one at which they add up to the budget: as it rises from 0, a tile gains its k-th token at
        k / (tokens * density), and the budget goes to those gained first.
        """
        sizes = tile_sizes(item)
        tile = torch.arange(len(sizes)).repeat_interleave(sizes)
        k = 1 + torch.arange(len(tile)) - (sizes.cumsum(0) - sizes)[tile]
        ratio = k / (sizes * self.densities(item, needs))[tile]
        return torch.bincount(tile[ratio.argsort(stable=True)[:budget]], minlength=len(sizes))

    def scores(self, item: VisualItem, needs: Needs) -> Tensor:
        """Logit of a thumbnail's token; of a crop's token its own and the thumbnail's at its place, `[tokens]`.

        The crops' logits and those of the thumbnail, enlarged to the crops' plane, have length 1 in every crop.
        """
        logits = _logits(item, needs)
        is_crop = item.tiles > 0
        thumbnail, stitched = plane_grids(item)
        overview = logits[~is_crop].view(1, 1, *thumbnail)
        enlarged = interpolate(overview, size=stitched, mode="bilinear", align_corners=False).flatten()
        scores = logits.clone()
        crops = item.tiles[is_crop]
        scores[is_crop] = _of_unit_length(logits[is_crop], crops) + _of_unit_length(enlarged, crops)
        return scores


def _logits(item: VisualItem, needs: Needs) -> Tensor:
    return item.cls_logits[needs.cls_logits[0]].float()


def _of_unit_length(values: Tensor, groups: Tensor) -> Tensor:
    """Scale `values` `[tokens]` so that those of every group have Euclidean length 1."""
    squares = values.new_zeros(int(groups.max()) + 1).index_add(0, groups, values.square())
    return values / squares.sqrt().clamp(min=1e-12)[groups]


def _in_official_order(kept: Tensor, item: VisualItem, scores: Tensor) -> Tensor:
    """`kept` in the order in which the authors' code puts tokens."""
    assert item.crops is not None
    in_thumbnail = item.tiles[kept] == 0
    thumbnail, crops = kept[in_thumbnail], kept[~in_thumbnail]
    thumbnail = thumbnail[scores[thumbnail].argsort(descending=True, stable=True)]
    rows, columns = plane_grids(item)[0]  # a crop before un-padding is as large
    number = one_hot(item.tiles).cumsum(0).gather(1, item.tiles[:, None])[crops, 0] - 1
    crop = item.tiles[crops] - 1
    row = crop // item.crops[1] * rows + number // columns
    column = crop % item.crops[1] * columns + number % columns
    return torch.cat([thumbnail, crops[(row * item.crops[1] * columns + column).argsort(stable=True)]])
