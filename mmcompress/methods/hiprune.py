"""HiPrune: anchors attended to in an object layer, their neighbours, and registers attended to in a deep layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmcompress.errors import SpecError
from mmcompress.method import VisualMethod
from mmcompress.ranking import choose_per_tile
from mmcompress.registry import register
from mmcompress.types import EncoderFacts, Needs, Selection, VisualItem

PAPER_DEPTH, PAPER_OBJECT_LAYER = 24, 8


@register(
    "hiprune",
    summary="Most attended tokens of an object layer with their neighbours, filled up with those of a deep layer.",
    family="encoder attention",
    paper="HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models, "
    "arXiv:2508.00553",
    licence="MIT",
)
@dataclass(frozen=True)
class HiPrune(VisualMethod):
    """Keep anchors, buffers and registers, ranked by the attention that a token receives from all tokens.

    Buffers are the tokens left, right, above and below of an anchor in the raster of its tile, read as one line: the
    ends of neighbouring rows are neighbours too, and beyond the first and the last token stand these two. Tiles of
    one image are treated apart and share the budget by size. Only layers that attend to the whole image count.

    Args:
        alpha: fraction in [0, 1] of the budget for anchors with their four buffers. Where buffers overlap, registers
            take their room; where rounding gives more than the budget, buffers with less deep attention are left out.
        object_layer: encoder layer that shows objects, 0-based; default: layer 8 of the paper's 24, scaled to the
            depth, or the nearest layer before the deep one that attends to the whole image (the later of two).
        deep_layer: encoder layer with global information; default: the last used layer that attends to the whole image.
    """

    alpha: float = 0.1
    object_layer: int | None = None
    deep_layer: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise SpecError(f"hiprune: alpha={self.alpha} must be in [0, 1].")

    def needs(self, encoder: EncoderFacts) -> Needs:
        """Received attention of the object layer, then the deep layer; of one alone where they are the same."""
        allowed = encoder.global_layers
        for name, layer in (("object_layer", self.object_layer), ("deep_layer", self.deep_layer)):
            if layer is not None and layer not in allowed:
                raise SpecError(f"hiprune: {name}={layer} does not attend to the whole image; layers {allowed} do.")
        deep = allowed[-1] if self.deep_layer is None else self.deep_layer
        objects = self.object_layer
        if objects is None:
            wanted = encoder.scale_layer(PAPER_OBJECT_LAYER, PAPER_DEPTH)
            before = [layer for layer in allowed if layer < deep] or [deep]
            objects = min(before, key=lambda layer: (abs(layer - wanted), -layer))
        return Needs(received_attention=(objects, deep) if objects != deep else (deep,))

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Keep anchors, buffers and registers of every tile, in raster order."""
        layers = needs.received_attention
        object_attention, deep_attention = (item.received_attention[layer].float() for layer in (layers[0], layers[-1]))
        widths = torch.tensor([columns for rows, columns in item.grids for _ in range(rows)], device=item.tiles.device)
        row = torch.arange(len(widths), device=widths.device).repeat_interleave(widths)

        def choose(members: Tensor, share: int) -> Tensor:
            width = int((row[members] == row[members[0]]).sum())
            return self._ranked(object_attention[members], deep_attention[members], width, share)[:share]

        return Selection(choose_per_tile(item.tiles, budget, choose).sort().values)

    def _ranked(self, object_attention: Tensor, deep_attention: Tensor, width: int, budget: int) -> Tensor:
        """All tokens of a tile `width` tokens wide: anchors, then buffers, then others, each by deep attention."""
        anchors = object_attention.argsort(descending=True, stable=True)[: round(budget * self.alpha / 5)]
        steps = torch.tensor([-1, 1, -width, width], device=anchors.device)
        buffers = (anchors[:, None] + steps).clamp(0, len(object_attention) - 1)
        precedence = torch.zeros_like(object_attention, dtype=torch.int64)
        precedence[buffers.flatten()] = 1
        precedence[anchors] = 2
        by_attention = deep_attention.argsort(descending=True, stable=True)
        return by_attention[precedence[by_attention].argsort(descending=True, stable=True)]
