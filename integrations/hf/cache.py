"""Caches that know tokens seen apart from tokens kept.

`get_seq_length` stays logical (what `generate` slices by and derives positions from); `get_query_offset` and
`get_mask_sizes` become physical (what masks are built from). The two differ by the tokens compression removed.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, StaticCache, StaticLayer
from transformers.masking_utils import create_causal_mask

from mmcompress.errors import UnsupportedError
from mmcompress.integrations.hf.draft import Reading
from mmcompress.integrations.hf.renamed import CACHE
from mmcompress.kv_policy import Quantiser
from mmcompress.sparse_reader import Summary


class PrunedLayer(CacheLayerMixin):
    """A cache layer of which `dropped` tokens were never stored; `peak` bytes were held before some were taken out."""

    dropped = 0
    peak = 0

    @abstractmethod
    def physical_length(self) -> Any:
        """Tokens stored; a static layer that was written to says it as a tensor."""

    @property
    def nbytes(self) -> int:
        """What keys and values occupy."""
        return sum(part.nbytes for part in (self.keys, self.values) if part is not None)

    def get_seq_length(self) -> Any:
        """Tokens seen."""
        return self.physical_length() + self.dropped

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.dropped = self.peak = 0


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


@dataclass(frozen=True, eq=False)
class Filled:
    """Which columns of a layer hold entries under a KV policy; layers that fill the same ones share it.

    Args:
        valid: `[batch, kv_heads, entries]` bool, which entries are no padding.
        seen: `[batch]`, tokens of each row so far.
        generated: `[batch]`, how many of them came behind the last prompt.
    """

    valid: Tensor
    seen: Tensor
    generated: Tensor

    @cached_property
    def whole(self) -> list[bool]:
        """Which rows have no padding."""
        whole: list[bool] = self.valid.flatten(1).all(dim=1).tolist()
        return whole

    def grown(self, new: Tensor, brings_prompt: bool) -> Filled:
        """With `new` `[batch, columns]` behind it."""
        added = new.sum(dim=1)
        return Filled(
            valid=torch.cat([self.valid, new[:, None].expand(-1, self.valid.shape[1], -1)], dim=2),
            seen=self.seen + added,
            generated=torch.zeros_like(added) if brings_prompt else self.generated + added,
        )

    def take(self, rows: Tensor) -> Filled:
        """Only the rows numbered `rows`."""
        return Filled(*(part[rows.to(part.device)] for part in (self.valid, self.seen, self.generated)))

    def crop(self, columns: int) -> Filled:
        """All but the last `columns`, which came behind the prompt."""
        gone = self.valid[:, 0, -columns:].sum(dim=1)
        return Filled(self.valid[..., :-columns], self.seen - gone, self.generated - gone)


@dataclass(frozen=True)
class Held:
    """What a layer holds under a KV policy.

    Args:
        filled: which columns hold entries.
        place: `[batch, kv_heads, entries]`, which token of its row each entry is of; not said yet of the last ones.
        visual: `[batch, kv_heads, entries]` bool, which are of visual tokens; likewise.
        capacity: `[batch]`, entries per head that the policy may leave.
        observed: `[batch, kv_heads, entries]`, what it counted of each; None if it does not count.
    """

    filled: Filled
    place: Tensor
    visual: Tensor
    capacity: Tensor
    observed: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """`[batch, kv_heads, entries]` bool, which entries are no padding."""
        return self.filled.valid

    @property
    def seen(self) -> Tensor:
        """`[batch]`, tokens of each row so far."""
        return self.filled.seen

    @property
    def generated(self) -> Tensor:
        """`[batch]`, how many of them came behind the last prompt."""
        return self.filled.generated

    def complete(self, visual: Tensor | None = None) -> Held:
        """The same, place and kind said of all entries; `visual` `[batch, columns]` of the last ones, if any are."""
        new = self.valid[..., self.place.shape[2] :]
        place = self.seen[:, None, None] - new.sum(dim=2, keepdim=True) + new.cumsum(dim=2) - 1
        kind = torch.zeros_like(new)
        if visual is not None:
            kind[..., new.shape[2] - visual.shape[1] :] = visual[:, None]
        observed = self.observed
        if observed is not None:
            observed = torch.cat([observed, observed.new_zeros(new.shape)], dim=2)
        return replace(
            self,
            place=torch.cat([self.place, place], dim=2),
            visual=torch.cat([self.visual, kind], dim=2),
            observed=observed,
        )

    def take(self, rows: Tensor, filled: Filled) -> Held:
        """Only the rows numbered `rows`, which fill what `filled` says."""
        parts = {name: part[rows.to(part.device)] for name, part in self._parts.items()}
        return replace(self, filled=filled, **parts)

    def crop(self, columns: int, filled: Filled) -> Held:
        """Without the last `columns`, which came behind the prompt; the others fill what `filled` says."""
        left = self.valid.shape[2] - columns
        parts = {name: part[..., :left] for name, part in self._parts.items() if part.dim() == 3}
        return replace(self, filled=filled, **parts)

    @property
    def _parts(self) -> dict[str, Tensor]:
        return {name: part for name, part in vars(self).items() if isinstance(part, Tensor)}


@dataclass
class CacheState:
    """What must outlive one forward pass, kept on the cache so that it dies with it.

    Args:
        mask: `[batch, physical]` bool, which tokens stored in the first layer are real.
        shift: `[batch]`, by how much renumbered positions lag behind the original ones.
        stretches: by layer, what is different from there on.
        held: by layer, what a KV policy left.
        masses: `[batch, layers]`, what a KV policy that compares layers found; None if it does not.
        reads: by layer, what a KV policy that reads a part knows of the keys.
        reading: how far a draft has read; None without one.
        quantiser: the KV policy that packs what is stored; None if none does.
        floor: how many tokens were seen when the last one arrived that compression may have removed.
    """

    mask: Tensor | None = None
    shift: Tensor | None = None
    stretches: dict[int, Stretch] = field(default_factory=dict)
    held: dict[int, Held] = field(default_factory=dict)
    masses: Tensor | None = None
    reads: dict[int, Summary] = field(default_factory=dict)
    reading: Reading | None = None
    quantiser: Quantiser | None = None
    floor: int = 0

    def copy(self) -> CacheState:
        """The same, to be changed without changing this one."""
        return replace(self, stretches=dict(self.stretches), held=dict(self.held), reads=dict(self.reads))

    def take(self, rows: Tensor) -> None:
        """Follow a cache whose rows became those numbered `rows`."""
        self.mask = None if self.mask is None else self.mask[rows.to(self.mask.device)]
        self.shift = None if self.shift is None else self.shift[rows.to(self.shift.device)]
        self.stretches = {layer: stretch.take(rows) for layer, stretch in self.stretches.items()}
        filled = {id(held.filled): held.filled.take(rows) for held in self.held.values()}
        self.held = {layer: held.take(rows, filled[id(held.filled)]) for layer, held in self.held.items()}
        self.masses = None if self.masses is None else self.masses[rows.to(self.masses.device)]
        self.reads = {layer: summary.take(rows) for layer, summary in self.reads.items()}
        self.reading = None if self.reading is None else self.reading.take(rows)

    def crop(self, columns: int) -> None:
        """Follow a cache that lost the last `columns`."""
        filled = {id(held.filled): held.filled.crop(columns) for held in self.held.values()}
        self.held = {layer: held.crop(columns, filled[id(held.filled)]) for layer, held in self.held.items()}
        self.reads = {}  # the next step reads all keys to know them again
        self.reading = None if self.reading is None else self.reading.crop(columns)


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
        if not self.entered and self.state.mask is not None:
            raise UnsupportedError(
                "this cache holds a compressed prompt; go on with it on a wrapped model, or start a new cache."
            )
        return super().update(*args, **kwargs)

    def stored(self, layer: int = 0) -> int:
        """Tokens stored in `layer`."""
        return int(cast(PrunedLayer, self.layers[layer]).physical_length()) if layer < len(self.layers) else 0

    @property
    def bytes(self) -> list[tuple[int, int]]:
        """By layer, bytes that are occupied now, and that were at most."""
        layers = cast(list[PrunedLayer], self.layers)
        return [(layer.nbytes, max(layer.peak, layer.nbytes)) for layer in layers]

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
            self.state.crop(seen - left)

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
    stored: dict[str, Any] = {CACHE: cache}
    return create_causal_mask(
        config=config,
        inputs_embeds=embeds,
        attention_mask=padding_mask(mask, cache),
        position_ids=None,
        layer_idx=layer,
        **stored,
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
