"""HiRED: the thumbnail's early CLS attention says how much of each crop stays, late CLS attention says what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmcompress.budget import largest_remainder
from mmcompress.errors import SpecError
from mmcompress.method import VisualMethod
from mmcompress.methods._anyres import thumbnail_cells, tile_sizes, top_of_every_tile
from mmcompress.methods._attention import Score
from mmcompress.ranking import top_indices, top_indices_per_tile
from mmcompress.registry import register
from mmcompress.types import EncoderFacts, Needs, Selection, VisualItem

_PARTS = 2**40


@register(
    "hired",
    summary="Budgets over crops by the thumbnail's CLS attention in the first layer, tokens by that of the last used.",
    family="CLS-guided",
    paper="HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models, "
    "arXiv:2408.10945",
    licence="MIT",
)
@dataclass(frozen=True)
class HiRED(VisualMethod):
    """Share a tiled image's budget out by what its thumbnail shows (Algorithm 1), then keep the most attended tokens.

    The thumbnail keeps `alpha` of the budget. A crop's part of the rest is the attention that its region of the
    thumbnail gets in the first layer; what a crop has no room for goes to the other crops, then to the thumbnail.
    Planes of other items share the budget by size.

    Args:
        alpha: share of the budget that the thumbnail keeps, at most all of it, rounded down.
        allocation: "spatial" sums attention over a crop's region; "stripes" is that of the authors' first code: it
            counts the 1 - `alpha` most attended tokens in as many horizontal stripes as there are crops.
        score: "cls" reads the CLS token's rows; "received" reads the attention a token receives from all tokens in the
            first and last layers that attend to the whole image, for encoders without CLS.
        compat: "official" rounds the crops' parts down and gives nobody what is left over, as paper and code do, and
            lets no newline token into the LLM, as the code does. In transformers padding is removed in any case, so
            what of the budget goes to padding in the authors' code is not lost.
    """

    alpha: float = 0.5
    allocation: Literal["spatial", "stripes"] = "spatial"
    score: Score = "cls"
    compat: Literal["none", "official"] = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise SpecError(f"hired: alpha={self.alpha} is out of range; use a share in [0, 1].")

    @property
    def exact_count(self) -> bool:
        """Whether what is left over by rounding is kept."""
        return self.compat == "none"

    @property
    def newlines(self) -> bool:
        """Whether newline tokens stay."""
        return self.compat == "none"

    def needs(self, encoder: EncoderFacts) -> Needs:
        """The CLS rows (or received attention) of the first and the last layer."""
        if self.score == "cls":
            return Needs(cls_rows=tuple(sorted({0, encoder.used - 1})))
        return Needs(received_attention=tuple(sorted({encoder.global_layers[0], encoder.global_layers[-1]})))

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Keep the most attended tokens of every tile, in raster order."""
        attention = self._attention(item, needs, -1)
        if item.crops is None:
            return Selection(top_indices_per_tile(attention, item.tiles, budget))
        return Selection(top_of_every_tile(attention, item.tiles, torch.tensor(self.shares(item, budget, needs))))

    def shares(self, item: VisualItem, budget: int, needs: Needs) -> list[int]:
        """Tokens kept of the thumbnail and of every crop of a tiled image."""
        size, *crops = tile_sizes(item).tolist()
        thumbnail = min(int(budget * self.alpha), size)
        rest = min(budget - thumbnail, sum(crops))
        weights = self._crop_weights(item, needs)
        if self.compat == "none":
            return [budget - rest, *divide(rest, weights, crops)]
        whole = sum(weights) or 1.0
        parts = [min(int(weight / whole * rest), crop) for weight, crop in zip(weights, crops, strict=True)]
        return [thumbnail if any(parts) else max(thumbnail, 1), *parts]

    def _crop_weights(self, item: VisualItem, needs: Needs) -> list[float]:
        """How much of the thumbnail's attention in the first layer falls to each crop, `[crops]`."""
        assert item.crops is not None
        crop_rows, crop_columns = item.crops
        attention = self._attention(item, needs, 0)[item.tiles == 0].cpu().double()
        row, column = thumbnail_cells(item)
        region = row * crop_rows // row.numel() * crop_columns + column * crop_columns // column.numel()
        if self.allocation == "stripes":
            tokens = len(attention)
            most = top_indices(attention, int(tokens * (1 - self.alpha)))
            attention = torch.zeros_like(attention).index_fill(0, most, 1)
            region = torch.arange(tokens) * (crop_rows * crop_columns) // tokens
        return attention.new_zeros(crop_rows * crop_columns).index_add(0, region.flatten(), attention).tolist()

    def _attention(self, item: VisualItem, needs: Needs, layer: int) -> Tensor:
        """Attention in the first (0) or the last (-1) layer, summed over heads, `[tokens]`."""
        if self.score == "cls":
            return item.cls_rows[needs.cls_rows[layer]].sum(dim=-1)
        return item.received_attention[needs.received_attention[layer]]


def divide(total: int, weights: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Divide `total` in proportion to `weights` by largest remainder; what a part has no room for goes to others."""
    shares = [0] * len(sizes)
    while left := total - sum(shares):
        room = [size - share for size, share in zip(sizes, shares, strict=True)]
        open_weights = [weight if free else 0.0 for weight, free in zip(weights, room, strict=True)]
        largest = max(open_weights)
        parts = [left * round(weight / largest * _PARTS) for weight in open_weights] if largest else room
        more = largest_remainder(left, parts)
        shares = [share + min(extra, free) for share, extra, free in zip(shares, more, room, strict=True)]
    return shares
