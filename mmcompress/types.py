"""The vocabulary that methods and engines share: what a method needs, sees and answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

Positions = Literal["renumber", "original"]
Modality = Literal["image", "video"]
Space = Literal["projected", "pre_projector"]


@dataclass(frozen=True)
class EncoderFacts:
    """What a method may know of the vision encoder before any forward pass.

    Args:
        depth: number of encoder layers.
        used: layers 0..used-1 shape the features that reach the LLM.
        global_layers: the layers below `used` in which every patch attends to the whole image.
        missing: statistics this encoder cannot supply, each with the reason.
        no_pre_projector: why features cannot be merged before the projector; "" if it maps each token by itself.
        no_encoder_stage: why tokens cannot be removed between encoder layers; "" if layers and projector take any.
        patches: tokens of a tile, CLS left out, where all tiles have equally many; else 0.
    """

    depth: int
    used: int
    global_layers: tuple[int, ...]
    missing: Mapping[str, str] = field(default_factory=dict)
    no_pre_projector: str = ""
    no_encoder_stage: str = ""
    patches: int = 0

    def scale_layer(self, layer: int, paper_depth: int) -> int:
        """Map a layer stated for a paper's encoder of `paper_depth` layers to this depth, clamped to used layers."""
        return min(round(layer * self.depth / paper_depth), self.used - 1)

    def scale_layers(self, layers: Sequence[int], paper_depth: int) -> tuple[int, ...]:
        """Map several of them, ascending; those that fall together are one."""
        return tuple(sorted({self.scale_layer(layer, paper_depth) for layer in layers}))


@dataclass(frozen=True)
class DraftNeeds:
    """What is read of a smaller model, a draft, that reads the prompt first.

    Args:
        folder: where it is.
        window: so many of the prompt's last queries.
        skip: share of its first layers that are not read.
        observe: what is made of a layer's attention rows `[heads, window, tokens]`: `[tokens]`.
    """

    folder: str
    window: int
    skip: float
    observe: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Needs:
    """The statistics a configured method reads, each as the encoder layers it is read from.

    No need is ever met by asking the model for attention maps: the values are computed from the queries and keys
    that pass through the attention layer, which itself stays on SDPA or FlashAttention.

    Args:
        cls_rows: attention row of the CLS token, per head.
        cls_logits: the same before the softmax, averaged over heads.
        cls_rows_full_width: the CLS row computed without splitting heads.
        received_attention: attention a patch receives, averaged over heads and queries.
        keys: keys, heads concatenated.
        key_metric: keys averaged over heads.
        features: encoder output before the projector.
        text: embeddings of the prompt's text tokens.
        text_tower: folder of a CLIP whose text side reads what the prompt asks; read together with `features`.
        draft: what is read of a smaller model that reads the prompt first.
        embeddings: whether the token embeddings are read to score or merge tokens (and so must be finite).
    """

    cls_rows: tuple[int, ...] = ()
    cls_logits: tuple[int, ...] = ()
    cls_rows_full_width: tuple[int, ...] = ()
    received_attention: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()
    key_metric: tuple[int, ...] = ()
    features: bool = False
    text: bool = False
    text_tower: str | None = None
    draft: DraftNeeds | None = None
    embeddings: bool = False

    def layers(self) -> dict[str, tuple[int, ...]]:
        """The attention statistics that are needed: name -> encoder layers."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, tuple) and value}


Statistic = Mapping[int, Tensor]


@dataclass(frozen=True)
class VisualItem:
    """One image with all its tiles, or one clip, as the LLM would see it; separators are left out.

    Args:
        embeddings: `[tokens, dim]`, projected tokens in sequence order.
        grids: `(rows, columns)` of each plane (thumbnail, stitched crops, frame), in sequence order, raster inside.
        tiles: `[tokens]`, the encoder tile each token comes from; 0 is the thumbnail of a tiled image.
        crops: `(rows, columns)` of the crops of a tiled image whose two planes are its thumbnail and its stitched
            crops, tiles 1.. in raster order; None for any other item.
        modality: "image" or "video".
        label: how error messages call the item.
        cls_rows: layer -> `[tokens, heads]`.
        cls_logits: layer -> `[tokens]`.
        cls_rows_full_width: layer -> `[tokens]`.
        received_attention: layer -> `[tokens]`.
        keys: layer -> `[tokens, width]`.
        key_metric: layer -> `[tokens, head_dim]`.
        features: `[tokens, width]` encoder output before the projector.
        text: `[text_tokens, dim]` embeddings of the row's text tokens.
        relevance: `[text_chunks, tokens]` cosine of each token's features with what the row asks, in a CLIP's space.
        drafted: `[draft_layers, tokens]`, what `DraftNeeds.observe` said of each token.
    """

    embeddings: Tensor
    grids: tuple[tuple[int, int], ...]
    tiles: Tensor
    modality: Modality = "image"
    label: str = "item"
    crops: tuple[int, int] | None = None
    cls_rows: Statistic = field(default_factory=dict)
    cls_logits: Statistic = field(default_factory=dict)
    cls_rows_full_width: Statistic = field(default_factory=dict)
    received_attention: Statistic = field(default_factory=dict)
    keys: Statistic = field(default_factory=dict)
    key_metric: Statistic = field(default_factory=dict)
    features: Tensor | None = None
    text: Tensor | None = None
    relevance: Tensor | None = None
    drafted: Tensor | None = None

    def __len__(self) -> int:
        return self.embeddings.shape[0]


@dataclass(frozen=True)
class Selection:
    """A linear map over an item's tokens: which stay, in output order, and what they absorb.

    Args:
        anchor: `[kept]` int64; for each output token the original index that gives its position. No index twice.
        weight: `[kept, tokens]` mixing weights; None means that tokens are kept as they are.
    """

    anchor: Tensor
    weight: Tensor | None = None

    def __len__(self) -> int:
        return self.anchor.shape[0]

    @classmethod
    def everything(cls, tokens: int, device: torch.device | None = None) -> Selection:
        """The selection that keeps all `tokens` unchanged."""
        return cls(torch.arange(tokens, device=device))

    def apply(self, tokens: Tensor) -> Tensor:
        """Map `[tokens, dim]` to `[kept, dim]`."""
        if self.weight is None:
            return tokens[self.anchor]
        return (self.weight.to(torch.float32) @ tokens.to(torch.float32)).to(tokens.dtype)


@dataclass(frozen=True)
class Trace:
    """What one prefill did to one item.

    Args:
        row: batch row of the item.
        modality: "image" or "video".
        grids: `(rows, columns)` of each plane of its tokens.
        selection: which tokens stayed, and what they absorbed.
        positions: `[tokens]` columns of its tokens in the prompt, separators left out.
    """

    row: int
    modality: Modality
    grids: tuple[tuple[int, int], ...]
    selection: Selection
    positions: Tensor
