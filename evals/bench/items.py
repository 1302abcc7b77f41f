"""Random items with the shapes that LLaVA-1.5-7B would give them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmcompress.errors import SpecError
from mmcompress.types import EncoderFacts, Modality, Needs, VisualItem

CLIP = EncoderFacts(depth=24, used=23, global_layers=tuple(range(23)))
DIM, WIDTH, TEXT_TOKENS, LARGEST_FRAME = 4096, 1024, 64, 16
WIDTHS = {"cls_rows": (16,), "keys": (WIDTH,), "key_metric": (64,)}


def make_item(tokens: int, needs: Needs, modality: Modality, seed: int, device: str) -> VisualItem:
    """An item with random values for all that `needs` names, its shape as its label.

    Embeddings and features are of 1 and -1, in widths that are powers of 4: float32 holds their cosines exactly, so
    that no two ways to add them up differ by rounding.
    """
    generator = torch.Generator().manual_seed(seed)

    def signs(rows: int, width: int) -> Tensor:
        bits = torch.randint(2, (rows, width), generator=generator, dtype=torch.int8)
        return (2 * bits - 1).to(device, torch.float32)

    grids, tiles, label = layout(tokens, modality)
    statistics: dict[str, Any] = {
        name: {layer: torch.rand(tokens, *WIDTHS.get(name, ()), generator=generator).to(device) for layer in layers}
        for name, layers in needs.layers().items()
    }
    return VisualItem(
        embeddings=signs(tokens, DIM),
        grids=grids,
        tiles=tiles.to(device),
        modality=modality,
        label=label,
        crops=(2, 2) if modality == "image" and len(grids) == 2 else None,
        features=signs(tokens, WIDTH) if needs.features else None,
        text=signs(TEXT_TOKENS, DIM) if needs.text else None,
        **statistics,
    )


def layout(tokens: int, modality: Modality) -> tuple[tuple[tuple[int, int], ...], Tensor, str]:
    """Grids, tiles and their description: a square plane, a thumbnail with 2 x 2 crops, or square frames.

    Raises:
        SpecError: there is none of so many tokens.
    """
    side, crop = math.isqrt(tokens), math.isqrt(tokens // 5)
    if tokens < 4 or tokens not in (side**2, 5 * crop**2):
        raise SpecError(f"no item of {tokens} tokens: give a square, for one plane, or 5 squares, for 2x2 crops.")
    if modality == "video":
        side = max(side for side in range(1, LARGEST_FRAME + 1) if tokens % side**2 == 0 and tokens > side**2)
        frames = tokens // side**2
        tiles = torch.arange(frames).repeat_interleave(side**2)
        return ((side, side),) * frames, tiles, f"{frames} frames {side}x{side}"
    if tokens == side**2:
        return ((side, side),), torch.zeros(tokens, dtype=torch.long), f"{side}x{side}"
    half = torch.arange(2 * crop) // crop
    tiles = torch.cat([torch.zeros(crop**2, dtype=torch.long), (1 + 2 * half[:, None] + half).flatten()])
    return ((crop, crop), (2 * crop, 2 * crop)), tiles, f"{crop}x{crop} + {2 * crop}x{2 * crop}"
