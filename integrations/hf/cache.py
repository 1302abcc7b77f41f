"""Caches that know tokens seen apart from tokens kept.

`get_seq_length` stays logical (what `generate` slices by and derives positions from); `get_query_offset` and
`get_mask_sizes` become physical (what masks are built from). The two differ by the tokens compression removed.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, StaticCache, StaticLayer
from transformers.masking_utils import create_causal_mask

from mmcompress.errors import UnsupportedError


class PrunedLayer(CacheLayerMixin):
    """A cache layer of which `dropped` tokens were never stored."""

    dropped = 0

    @abstractmethod
    def physical_length(self) -> Any:
        """Tokens stored; a static layer that was written to says it as a tensor."""

    def get_seq_length(self) -> Any:
        """Tokens seen."""
        return self.physical_length() + self.dropped

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.dropped = 0


class PrunedDynamicLayer(PrunedLayer, DynamicLayer):
    """A `PrunedLayer` that grows."""

    def physical_length(self) -> int:
        """Tokens stored."""
        return DynamicLayer.get_seq_length(self)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys a query of `query_length` meets."""
        return self.physical_length() + query_length, 0


class PrunedStaticLayer(PrunedLayer, StaticLayer):
    """A `PrunedLayer` of fixed size."""

    def physical_length(self) -> int | Tensor:
        """Tokens stored."""
        return StaticLayer.get_seq_length(self)


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


@dataclass(frozen=True)
class Held:
    """What a layer holds under a KV policy.

    Args:
        valid: `[batch, kv_heads, entries]` bool, which entries are no padding.
        place: `[batch, kv_heads, entries]`, which token of its row each entry is of.
        visual: `[batch, kv_heads, entries]` bool, which are of visual tokens.
        seen: `[batch]`, tokens of each row so far.
        generated: `[batch]`, how many of them came behind the last prompt.
        capacity: `[batch]`, entries per head that the policy may leave.
        observed: `[batch, kv_heads, entries]`, what it counted of each; None if it does not count.
    """

    valid: Tensor
    place: Tensor
    visual: Tensor
    seen: Tensor
    generated: Tensor
    capacity: Tensor
    observed: Tensor | None = None

    def take(self, rows: Tensor) -> Held:
        """Only the rows numbered `rows`."""
        return replace(self, **{name: part[rows.to(part.device)] for name, part in self._parts.items()})

    def crop(self, columns: int) -> Held:
        """All but the last `columns`, which came behind the prompt."""
        gone = self.valid[:, 0, -columns:].sum(dim=1)
        by_entry = {name: part[..., :-columns] for name, part in self._parts.items() if part.dim() == 3}
        return replace(self, seen=self.seen - gone, generated=self.generated - gone, **by_entry)

    @property
    def _parts(self) -> dict[str, Tensor]:
        return {name: part for name, part in vars(self).items() if part is not None}


@dataclass
class CacheState:
    """What must outlive one forward pass, kept on the cache so that it dies with it.

    Args:
        mask: `[batch, physical]` bool, which tokens stored in the first layer are real.
        shift: `[batch]`, by how much renumbered positions lag behind the original ones.
        stretches: by layer, what is different from there on.
        held: by layer, what a KV policy left.
        masses: `[batch, layers]`, what a KV policy that compares layers found; None if it does not.
        floor: how many tokens were seen when the last one arrived that compression may have removed.
    """

    mask: Tensor | None = None
    shift: Tensor | None = None
    stretches: dict[int, Stretch] = field(default_factory=dict)
    held: dict[int, Held] = field(default_factory=dict)
    masses: Tensor | None = None
    floor: int = 0

    def copy(self) -> CacheState:
        """The same, to be changed without changing this one."""
        return replace(self, stretches=dict(self.stretches), held=dict(self.held))

    def take(self, rows: Tensor) -> None:
        """Follow a cache whose rows became those numbered `rows`."""
        self.mask = None if self.mask is None else self.mask[rows.to(self.mask.device)]
        self.shift = None if self.shift is None else self.shift[rows.to(self.shift.device)]
        self.stretches = {layer: stretch.take(rows) for layer, stretch in self.stretches.items()}
        self.held = {layer: held.take(rows) for layer, held in self.held.items()}
        self.masses = None if self.masses is None else self.masses[rows.to(self.masses.device)]


class PrunedCache(Cache):
    """A cache whose layers are `PrunedLayer`s; made from an existing cache by `adopt`.

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

    def stored(self, layer: int = 0) -> int:
        """Tokens stored in `layer`."""
        return int(cast(PrunedLayer, self.layers[layer]).physical_length()) if layer < len(self.layers) else 0

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Tokens stored in layer `layer_idx`; between passes tokens seen, by which `generate` builds its masks."""
        if not self.entered or layer_idx >= len(self.layers):
            return self.get_seq_length(layer_idx)
        return cast(PrunedLayer, self.layers[layer_idx]).physical_length()

    def drop(self, tokens: int, first: int = 0) -> None:
        """Note that `tokens` were seen by every layer and stored by none from the layer `first` on."""
        for layer in self.layers[first:]:
            cast(PrunedLayer, layer).dropped += tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens off again: so many as a negative number, or, before transformers 5.20, all but so many.

        Raises:
            UnsupportedError: some of them came before others that were taken out.
        """
        seen = int(self.get_seq_length())
        left = seen + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, seen)
        if left < self.state.floor:
            raise UnsupportedError(
                f"cannot crop a cache to {left} tokens: the first {self.state.floor} are compressed and stay together."
            )
        super().crop(tokens_to_remove)
        if left < seen:
            self.state.held = {layer: held.crop(seen - left) for layer, held in self.state.held.items()}

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


class PrunedDynamicCache(PrunedCache, DynamicCache):
    """A `PrunedCache` that grows."""


class PrunedStaticCache(PrunedCache, StaticCache):
    """A `PrunedCache` of fixed size."""


def padding_mask(mask: Tensor, cache: Cache | None) -> Tensor | None:
    """`mask` `[batch, columns]` as transformers takes it; None where a pass into `cache` needs none.

    Without a cache, transformers takes gaps between kept positions for packed sequences unless given a mask. In a
    static cache it tells what is filled.
    """
    return mask.long() if not isinstance(cache, DynamicCache) or not bool(mask.all()) else None


def layer_mask(
    config: PretrainedConfig, embeds: Tensor, mask: Tensor, cache: PrunedCache | None, layer: int = 0
) -> Any:
    """What decoder layer `layer` takes as attention mask where `mask` `[batch, stored + new]` tells what is real."""
    return create_causal_mask(
        config=config,
        inputs_embeds=embeds,
        attention_mask=padding_mask(mask, cache),
        past_key_values=cache,
        position_ids=None,
        layer_idx=layer,
    )


def head_mask(config: PretrainedConfig, embeds: Tensor, valid: Tensor) -> Tensor:
    """`layer_mask` where KV heads hold different entries: `valid` `[batch, kv_heads, stored + new]` tells which.

    Returns:
        `[batch, heads, new, stored + new]`, bool for SDPA, to be added for eager attention.
    """
    new, total = embeds.shape[1], valid.shape[2]
    heads: int = config.num_attention_heads // valid.shape[1]
    causal = torch.ones(new, total, dtype=torch.bool, device=valid.device).tril(total - new)
    itself = torch.ones_like(causal).triu(total - new) & causal  # padding sees nothing else, and must see something
    sees = valid.repeat_interleave(heads, dim=1)[:, :, None] & causal | itself
    if config._attn_implementation == "sdpa":
        return sees
    return torch.zeros_like(sees, dtype=embeds.dtype).masked_fill(~sees, torch.finfo(embeds.dtype).min)


_PRUNED: dict[type, tuple[type[PrunedCache], type, type[PrunedLayer]]] = {
    DynamicCache: (PrunedDynamicCache, DynamicLayer, PrunedDynamicLayer),
    StaticCache: (PrunedStaticCache, StaticLayer, PrunedStaticLayer),
}


def adopt(cache: Cache) -> PrunedCache:
    """Turn a plain dynamic or static cache, empty or filled, into a `PrunedCache` in place.

    Raises:
        UnsupportedError: the cache is of another kind.
    """
    if isinstance(cache, PrunedCache):
        return cache
    pruned, plain_layer, pruned_layer = _PRUNED.get(type(cache), (None, None, PrunedLayer))
    others = {type(layer).__name__ for layer in getattr(cache, "layers", []) if type(layer) is not plain_layer}
    if pruned is None or others:
        layers = f" with {', '.join(sorted(others))}" if others else ""
        raise UnsupportedError(
            f"cannot compress into a {type(cache).__name__}{layers}; use a DynamicCache, which is the default, or a "
            "StaticCache, without sliding-window layers."
        )
    for layer in cache.layers:
        layer.__class__ = pruned_layer
    if cache.layer_class_to_replicate is not None:
        cache.layer_class_to_replicate = pruned_layer
    adopted: Any = cache
    adopted.__class__ = pruned
    adopted.state = CacheState()
    adopted.entered = False
    return adopted
