"""Caches that know tokens seen apart from tokens kept.

`get_seq_length` stays logical (what `generate` slices by and derives positions from); `get_query_offset` and
`get_mask_sizes` become physical (what masks are built from). The two differ by the tokens compression removed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
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


@dataclass(frozen=True)
class Stretch:
    """What the layers from one on store, where tokens were removed before it.

    Args:
        mask: `[batch, physical]` bool, which stored tokens are real.
        shift: `[batch]`, by how much its positions lag behind those of the first layer; None if they do not.
    """

    mask: Tensor
    shift: Tensor | None

    def take(self, rows: Tensor) -> Stretch:
        """Only the rows numbered `rows`."""
        shift = None if self.shift is None else self.shift[rows.to(self.shift.device)]
        return Stretch(self.mask[rows.to(self.mask.device)], shift)


@dataclass
class CacheState:
    """What must outlive one forward pass, kept on the cache so that it dies with it.

    Args:
        mask: `[batch, physical]` bool, which tokens stored in the first layer are real.
        shift: `[batch]`, by how much renumbered positions lag behind the original ones.
        stretches: by layer, what is different from there on.
    """

    mask: Tensor | None = None
    shift: Tensor | None = None
    stretches: dict[int, Stretch] = field(default_factory=dict)

    def copy(self) -> CacheState:
        """The same, to be changed without changing this one."""
        return CacheState(self.mask, self.shift, dict(self.stretches))

    def take(self, rows: Tensor) -> None:
        """Follow a cache whose rows became those numbered `rows`."""
        self.mask = None if self.mask is None else self.mask[rows.to(self.mask.device)]
        self.shift = None if self.shift is None else self.shift[rows.to(self.shift.device)]
        self.stretches = {layer: stretch.take(rows) for layer, stretch in self.stretches.items()}


class PrunedCache(DynamicCache):
    """A `DynamicCache` whose layers are `PrunedLayer`s; made from an existing cache by `adopt`.

    Args:
        state: what outlives a forward pass.
        entered: whether a wrapped model is at work on the cache, with the masks and positions it needs.
    """

    state: CacheState
    entered: bool

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values of a layer.

        Raises:
            UnsupportedError: the model at work is not wrapped, so its masks and positions do not fit what is stored.
        """
        if not self.entered:
            raise UnsupportedError(
                "this cache holds a compressed prompt; go on with it on a wrapped model, or start a new cache."
            )
        return super().update(*args, **kwargs)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Tokens stored in layer `layer_idx`."""
        return cast(PrunedLayer, self.layers[layer_idx]).physical_length() if layer_idx < len(self.layers) else 0

    def drop(self, tokens: int, first: int = 0) -> None:
        """Note that `tokens` were seen by every layer and stored by none from the layer `first` on."""
        for layer in self.layers[first:]:
            cast(PrunedLayer, layer).dropped += tokens

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace every row by that of its beam."""
        super().reorder_cache(beam_idx)
        self.state.take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row in place."""
        super().batch_repeat_interleave(repeats)
        if self.state.mask is not None:
            self.state.take(torch.arange(len(self.state.mask)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows numbered `indices`."""
        super().batch_select_indices(indices)
        self.state.take(indices)

    def reset(self) -> None:
        """Forget all tokens and the state that went with them."""
        super().reset()
        self.state = CacheState()


def padding_mask(mask: Tensor, cache: Cache | None) -> Tensor | None:
    """`mask` `[batch, columns]` as transformers takes it; None where a pass into `cache` needs none.

    Without a cache, transformers takes gaps between kept positions for packed sequences unless given a mask.
    """
    return mask.long() if cache is None or not bool(mask.all()) else None


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
    adopted.entered = False
    return adopted
