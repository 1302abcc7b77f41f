"""An item as frames that can be compared position by position."""

from __future__ import annotations

from torch import Tensor

from mmcompress.types import VisualItem


def frame_shape(item: VisualItem) -> tuple[int, int]:
    """`(frames, tokens per frame)`: planes of one grid are frames; where grids differ, the whole item is one frame."""
    frames = len(item.grids) if len(set(item.grids)) == 1 else 1
    return frames, len(item) // frames


def as_frames(item: VisualItem) -> Tensor:
    """The embeddings as `[frames, tokens per frame, dim]` in float32."""
    return item.embeddings.float().unflatten(0, frame_shape(item))
