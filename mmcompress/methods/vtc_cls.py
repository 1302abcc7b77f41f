"""VTC-CLS: keep what the CLS token attends to, summed over the encoder's later layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmcompress.errors import SpecError
from mmcompress.method import VisualMethod
from mmcompress.ranking import top_indices_per_tile
from mmcompress.registry import register
from mmcompress.types import EncoderFacts, Needs, Selection, VisualItem

PAPER_DEPTH, PAPER_FIRST_LAYER = 24, 16


@register(
    "vtc-cls",
    summary="Tokens with the most CLS attention, summed over the later encoder layers.",
    family="CLS-guided",
    paper="[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs, arXiv:2412.05819",
    licence="Apache-2.0",
)
@dataclass(frozen=True)
class VTCCLS(VisualMethod):
    """Rank tokens by attention summed from `first_layer` to the layer whose output the LLM sees (Section 3).

    Tiles of one image are ranked apart and share the budget by size.

    Args:
        first_layer: first encoder layer of the sum, 0-based; default: layer 16 of the paper's 24, scaled to the depth.
        score: "cls" reads the CLS token's rows; "received" reads the attention a token receives from all tokens,
            for encoders without CLS.
    """

    first_layer: int | None = None
    score: Literal["cls", "received"] = "cls"

    def needs(self, encoder: EncoderFacts) -> Needs:
        """The CLS rows (or received attention) of the layers that are summed."""
        first = self.first_layer
        if first is None:
            first = encoder.scale_layer(PAPER_FIRST_LAYER, PAPER_DEPTH)
        if not 0 <= first < encoder.used:
            raise SpecError(
                f"vtc-cls: first_layer={first} is out of range; this encoder uses layers 0..{encoder.used - 1}."
            )
        if self.score == "cls":
            return Needs(cls_rows=tuple(range(first, encoder.used)))
        later = tuple(layer for layer in encoder.global_layers if layer >= first)
        if not later and self.first_layer is not None:
            raise SpecError(
                f"vtc-cls: no layer from {first} on attends to the whole image; {encoder.global_layers} do."
            )
        return Needs(received_attention=later or encoder.global_layers[-1:])

    def scores(self, item: VisualItem, needs: Needs) -> Tensor:
        """Attention per token, `[tokens]`: the sum over layers of the mean over heads."""
        if self.score == "cls":
            return torch.stack([item.cls_rows[layer].mean(dim=-1) for layer in needs.cls_rows]).sum(dim=0)
        return torch.stack([item.received_attention[layer] for layer in needs.received_attention]).sum(dim=0)

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Keep the highest scores of every tile, in raster order."""
        return Selection(top_indices_per_tile(self.scores(item, needs), item.tiles, budget))
