"""Caches that know tokens seen apart from tokens kept.

`get_seq_length` stays logical (what `generate` slices by and derives positions from); `get_query_offset` and
`get_mask_sizes` become physical (what masks are built from). The two differ by the tokens compression removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from mmcompress.errors import UnsupportedError


class PrunedLayer(DynamicLayer):
    """A dynamic cache layer of which `dropped` tokens were never stored."""

    dropped = 0

    def physical_length(self) -> int:
        """Tokens stored."""
        return DynamicLayer.get_seq_length(self)

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.physical_length() + self.dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys a query of `query_length` meets."""
        return self.physical_length() + query_length, 0

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.dropped = 0


@dataclass
class CacheState:
    """What must outlive one forward pass, kept on the cache so that it dies with it.

    Args:
        mask: `[batch, physical]` bool, which stored tokens are real.
        shift: `[batch]`, by how much renumbered positions lag behind the original ones.
    """

    mask: Tensor | None = None
    shift: Tensor | None = None

    def expand(self, batch: int) -> None:
        """Follow a cache whose rows were repeated (beams, several samples per prompt)."""
        if self.mask is not None and self.mask.shape[0] != batch:
            self.mask = self.mask.repeat_interleave(batch // self.mask.shape[0], dim=0)
        if self.shift is not None and self.shift.shape[0] != batch:
            self.shift = self.shift.repeat_interleave(batch // self.shift.shape[0], dim=0)


class PrunedCache(DynamicCache):
    """A `DynamicCache` whose layers are `PrunedLayer`s; made from an existing cache by `adopt`."""

    state: CacheState

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Tokens stored in layer `layer_idx`."""
        return cast(PrunedLayer, self.layers[layer_idx]).physical_length() if layer_idx < len(self.layers) else 0

    def drop(self, tokens: int) -> None:
        """Note that `tokens` were seen by every layer and stored by none."""
        for layer in self.layers:
            cast(PrunedLayer, layer).dropped += tokens

    def reset(self) -> None:
        """Forget all tokens and the state that went with them."""
        super().reset()
        self.state = CacheState()


def adopt(cache: Cache) -> PrunedCache:
    """Turn a plain dynamic cache, empty or filled, into a `PrunedCache` in place.

    Raises:
        UnsupportedError: the cache is of another kind.
    """
    if isinstance(cache, PrunedCache):
        return cache
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        kinds = {type(layer).__name__ for layer in getattr(cache, "layers", [])} - {"DynamicLayer"}
        layers = f" with {', '.join(sorted(kinds))}" if kinds else ""
        raise UnsupportedError(
            f"cannot compress into a {type(cache).__name__}{layers}; use the default DynamicCache "
            "(leave out cache_implementation and sliding-window layers)."
        )
    for layer in cache.layers:
        layer.__class__ = PrunedLayer
    if cache.layer_class_to_replicate is not None:
        cache.layer_class_to_replicate = PrunedLayer
    adopted: Any = cache
    adopted.__class__ = PrunedCache
    adopted.state = CacheState()
    return adopted
