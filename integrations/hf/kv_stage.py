"""The KV stage: hooks on decoder layers that take entries out of a layer's cache as soon as its attention has run.

A policy that compares layers or looks ahead waits for the last one. What a layer holds is kept with the cache, per row
and KV head: masks of later passes are built from it, layer by layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from mmcompress.budget import Budget
from mmcompress.errors import UnsupportedError
from mmcompress.integrations.hf.attached import Attached
from mmcompress.integrations.hf.cache import CacheState, Filled, Held, PrunedCache, head_mask, layer_mask
from mmcompress.integrations.hf.families import Family
from mmcompress.integrations.hf.generation import cache_asked
from mmcompress.integrations.hf.llm_run import Run
from mmcompress.integrations.hf.taps import tap
from mmcompress.kv_policy import Ahead, Evictor, KVRow
from mmcompress.policies._rotary import unrotate

Asked = tuple[Tensor | None, Tensor | None]
"""Queries of a row `[heads, queries, dim]`, rotated and before rotation; None where they are not needed."""


@dataclass
class KVRun:
    """One pass of the text model that stores keys and values.

    Args:
        cache: where.
        state: what the cache is to remember, changed on the way.
        current: `[batch, length]` which of the columns that entered are no padding.
        visual: `[batch, length]` which are visual tokens.
        past: `[batch, stored]` which of the columns that were stored before are no padding.
        ids: their position ids `[..., batch, length]`.
        said: how many of the last columns came behind the prompt.
        seen: how many columns were seen, with those of this pass.
        inside: the same pass on its way through layers that lose tokens.
        queries: what the layer that is running asks, `[batch, heads, columns, dim]`.
        scaling: factor on its logits.
        rotary: its cosines and sines.
        filled: what layers share, by what it was made of.
        masks: by what is filled in them, the masks of layers.
        waiting: by layer that is to lose entries behind the last one, what each row asked there.
        dropped: `[batch]`, how many entries the first layer lost; None if no layer lost any.
        look_ahead: reads on as a draft expects, and returns `ahead`; None without a draft.
        ahead: by layer the tokens that a draft expects in each row; None but in the pass that reads them, and after it.
    """

    cache: PrunedCache
    state: CacheState
    current: Tensor
    visual: Tensor
    past: Tensor
    ids: Tensor
    said: int
    seen: int
    inside: Run | None = None
    queries: Tensor | None = None
    scaling: float = 1.0
    rotary: tuple[Tensor, Tensor] | None = None
    filled: dict[Any, Filled] = field(default_factory=dict)
    masks: dict[Filled, Any] = field(default_factory=dict)
    waiting: dict[int, list[Asked]] = field(default_factory=dict)
    dropped: Tensor | None = None
    look_ahead: Callable[[], dict[int, list[Ahead]]] | None = None
    ahead: dict[int, list[Ahead]] | None = None

    @property
    def brings_prompt(self) -> bool:
        """Whether more is read than the token that was generated last."""
        return self.current.shape[1] - self.said > 1

    def grown(self, before: Filled) -> Filled:
        """What is filled once the columns of this pass are stored."""
        new = self.columns()[0]  # held by the key, so that its identity is nobody else's
        if (before, new) not in self.filled:
            self.filled[before, new] = before.grown(new, self.brings_prompt)
        return self.filled[before, new]

    def columns(self) -> tuple[Tensor, Tensor]:
        """Which of the columns that are left at this depth are no padding, and which are visual tokens."""
        prompt = None if self.inside is None else self.inside.prompt
        return (self.current, self.visual) if prompt is None else (prompt.valid, prompt.visual)


class _Local(threading.local):
    """What one thread is computing."""

    def __init__(self) -> None:
        self.run: KVRun | None = None


def _is_headwise(policy: Evictor) -> bool:
    return type(policy).head_budgets is not Evictor.head_budgets


def require_kv(family: Family, model: Any, policy: Evictor, keep: Budget) -> None:
    """Check, before anything is changed, that `policy` can act on a model.

    Raises:
        UnsupportedError: the model's attention, positions or cache cannot take what the policy leaves.
        SpecError: the budget is too small for any prompt.
    """
    name, attention = policy.info.name, family.base.get_decoder().config._attn_implementation
    policy.require(keep)
    if _is_headwise(policy) and attention not in ("sdpa", "eager"):
        raise UnsupportedError(
            f"KV policy {name} leaves every head another number of entries, and {attention} takes one mask for all "
            "heads; load the model with attn_implementation='sdpa'."
        )
    if policy.positions == "renumber" and family.positions == "original":
        raise UnsupportedError(
            f"KV policy {name} numbers what stays by its place in the cache, but the positions of "
            f"{type(family.base).__name__} have three rows (M-RoPE) and no such place; give compat=none."
        )
    if "static" in (asked := cache_asked(model)):
        raise UnsupportedError(
            f"KV policy {name} changes how much a cache holds, but the model's generation_config asks for "
            f"cache_implementation={asked!r}; set that to None."
        )


class KVStage(Attached):
    """The hooks of one evicting policy on one model.

    Args:
        family: the model.
        policy: what goes.
        keep: what stays, of each row and per KV head, of the entries in the policy's scope.
    """

    def __init__(self, family: Family, policy: Evictor, keep: Budget) -> None:
        self.policy, self.keep = policy, keep
        self._needs = policy.needs()
        self._counts = type(policy).observe is not Evictor.observe
        self._headwise = _is_headwise(policy)
        self._renumbers = policy.positions == "renumber"
        self._decoder: Any = family.base.get_decoder()
        self._local = _Local()
        self._hooks: list[Any] = []
        self._tapped: list[tuple[nn.Module, Any]] = []
        for layer, block in enumerate(self._decoder.layers):
            self._hooks += [
                block.register_forward_pre_hook(partial(self._before_layer, layer), with_kwargs=True),
                block.self_attn.register_forward_hook(partial(self._after_attention, layer)),
            ]
            if self._needs.queries or self._needs.steps:
                self._tapped.append((block.self_attn, tap(block.self_attn, self._collect)))

    def remove(self) -> None:
        """Take every hook off, and give every module its own config back."""
        for hook in self._hooks:
            hook.remove()
        for attention, original in self._tapped:
            attention.config = original

    def begin(self, run: KVRun) -> None:
        """Follow a pass.

        Raises:
            UnsupportedError: entries cannot be taken out of this cache.
        """
        if not isinstance(run.cache, DynamicCache):
            raise UnsupportedError(
                f"KV policy {self.policy.info.name} changes how much a cache holds, which static ones do not take; "
                "leave out cache_implementation."
            )
        self._local.run = run

    def finish(self) -> None:
        """Take out what waited for the last layer, and settle what the pass changed for all layers."""
        run = self._local.run
        if run is None:
            return
        if run.waiting:
            self._evict_waiting(run)
        if run.dropped is not None:
            run.state.floor = run.seen
            if self._renumbers:
                run.state.shift = run.dropped if run.state.shift is None else run.state.shift + run.dropped

    def end(self) -> None:
        """Follow nothing any more."""
        self._local.run = None

    def _before_layer(self, layer: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        run = self._local.run
        if run is None:
            return None
        run.rotary = kwargs["position_embeddings"]
        held = run.state.held.get(layer)
        if held is None:
            return None
        filled, config = run.grown(held.filled), self._decoder.config
        if filled not in run.masks:
            run.masks[filled] = (
                head_mask(config, args[0], filled.valid)
                if self._headwise
                else layer_mask(config, args[0], filled.valid[:, 0], run.cache, layer)
            )
        return args, {**kwargs, "attention_mask": run.masks[filled]}

    def _collect(self, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> None:
        if self._local.run is not None:
            self._local.run.queries, self._local.run.scaling = query.detach(), kwargs["scaling"]

    @torch.no_grad()
    def _after_attention(self, layer: int, module: Any, args: Any, output: Any) -> None:
        run = self._local.run
        if run is None:
            return
        if run.ahead is not None:
            run.ahead[layer] = _ahead(run, run.cache.layers[layer])
            return
        brings_prompt = layer not in run.state.held or run.brings_prompt
        held = run.state.held.get(layer) or _before(run, run.cache.layers[layer])
        held = replace(held, filled=run.grown(held.filled))
        if brings_prompt or self.policy.schedule == "step":
            held = held.complete(run.columns()[1])
            asked = [self._asked(run, held, row) for row in range(len(held.valid))]
            if brings_prompt and (self._needs.masses or self._needs.lookahead):
                run.waiting[layer] = asked
            else:
                held = self._evict(run, layer, held, asked, brings_prompt)
        run.state.held[layer] = held

    def _evict_waiting(self, run: KVRun) -> None:
        if run.look_ahead is not None:
            run.ahead = run.look_ahead()
        if self._needs.masses:
            self._compare_layers(run)
        for layer, asked in run.waiting.items():
            run.state.held[layer] = self._evict(run, layer, run.state.held[layer], asked, brings_prompt=True)

    def _compare_layers(self, run: KVRun) -> None:
        held, asked = run.state.held, run.waiting
        rows = range(len(run.current))
        masses = [[self.policy.mass(self._views(run, n, held[n], row, asked[n][row])[0]) for n in held] for row in rows]
        run.state.masses = torch.stack([torch.stack([mass.to(run.current.device) for mass in row]) for row in masses])

    def _evict(self, run: KVRun, layer: int, held: Held, asked: Sequence[Asked], brings_prompt: bool) -> Held:
        capacity, observed = held.capacity.clone(), held.observed
        due = brings_prompt or int(held.generated.max()) % self.policy.every == 0
        rows: list[list[KVRow]] = []
        kept: list[list[Tensor]] = []
        for row in range(len(held.valid)):
            views = self._views(run, layer, held, row, asked[row])
            if brings_prompt:
                capacity[row] = self._capacity(views[0].visual)
            if self._counts:
                if observed is None:
                    observed = torch.zeros(held.place.shape, device=held.place.device)
                (view,) = views
                observed[row][held.valid[row]] += self.policy.observe(view).flatten().to(observed.device)
                so_far = observed[row][held.valid[row]].view(view.place.shape)
                views = [replace(view, observed=so_far.to(view.key.device))]
            rows.append(views)
            kept.append(self._choose(views, self._room(held, row, int(capacity[row])) if due else held.valid.shape[2]))
        held = replace(held, capacity=capacity, observed=observed)
        entries = held.valid.sum(dim=2).flatten().tolist()
        if [len(indices) for heads in kept for indices in heads] == entries:
            return held
        return self._hold(run, layer, held, rows, kept)

    def _room(self, held: Held, row: int, capacity: int) -> int:
        """How many entries may stay now: what was generated is text, and on top of a visual budget."""
        return capacity + int(held.generated[row]) if self.policy.scope == "visual" else capacity

    def _choose(self, views: Sequence[KVRow], capacity: int) -> list[Tensor]:
        if len(views) > 1:
            return self.policy.select_heads(views, capacity)
        (view,) = views
        if view.entries > capacity:
            return self.policy.select(view, capacity)
        return [torch.arange(view.entries, device=view.key.device)] * len(view.key)

    def _hold(
        self, run: KVRun, layer: int, held: Held, rows: Sequence[Sequence[KVRow]], kept: Sequence[Sequence[Tensor]]
    ) -> Held:
        stored: Any = run.cache.layers[layer]
        stored.peak = max(stored.peak, stored.nbytes)
        length = held.valid.shape[2]
        left = max(len(indices) for heads in kept for indices in heads)
        if layer == 0:
            counts = torch.tensor([len(heads[0]) for heads in kept], device=held.seen.device)
            run.dropped = held.valid[:, 0].sum(dim=1) - counts
        elif run.dropped is None:
            run.dropped = torch.zeros_like(held.seen)
        columns = [
            [valid.nonzero()[:, 0][indices.to(valid.device)] for valid, indices in zip(row, heads, strict=True)]
            for row, heads in zip(held.valid, kept, strict=True)
        ]
        index = _aligned(columns, left)
        key = (held.filled, left, *(len(indices) for heads in kept for indices in heads))
        if key not in run.filled:
            valid = _aligned([[column.new_ones(len(column)) for column in heads] for heads in columns], left)
            run.filled[key] = replace(held.filled, valid=valid.bool())
        keys: list[list[Tensor]] = []
        values: list[list[Tensor]] = []
        for views, heads in zip(rows, kept, strict=True):
            parts = [heads] if len(views) == 1 else [[indices] for indices in heads]
            held_parts = [self.policy.hold(view, part) for view, part in zip(views, parts, strict=True)]
            keys.append([key for part, _ in held_parts for key in part])
            values.append([value for _, part in held_parts for value in part])
        stored.keys, stored.values = _aligned(keys, left), _aligned(values, left)
        stored.dropped += length - left
        return replace(
            held,
            filled=run.filled[key],
            place=held.place.gather(2, index),
            visual=held.visual.gather(2, index),
            observed=None if held.observed is None else held.observed.gather(2, index),
        )

    def _capacity(self, visual: Tensor) -> int:
        entries = visual.shape[1]
        scoped = entries if self.policy.scope == "all" else int((visual[0] == (self.policy.scope == "visual")).sum())
        return self.policy.capacity(self.keep, entries, scoped)

    def _views(self, run: KVRun, layer: int, held: Held, row: int, asked: Asked) -> list[KVRow]:
        """The entries of a row; where its KV heads hold different numbers of them, head by head."""
        stored: Any = run.cache.layers[layer]
        counts = held.valid[row].sum(dim=1).tolist()
        heads, query, unrotated = len(counts), *asked
        parts = [slice(0, heads)] if len({*counts}) == 1 else [slice(head, head + 1) for head in range(heads)]
        newest = int(run.ids[..., row, -1].max())
        held_or_seen = counts[0] if self._renumbers else int(held.seen[row])

        def share(heads_of: Tensor | None, part: slice) -> Tensor | None:
            return None if heads_of is None else heads_of.unflatten(0, (heads, -1))[part].flatten(0, 1)

        def entries(held_of: Tensor, part: slice) -> Tensor:
            of_row = held_of[row][part]
            if not held.filled.whole[row]:
                here = held.valid[row][part].to(of_row.device)
                of_row = of_row[here].unflatten(0, (len(here), -1))
            return of_row.to(stored.keys.device)

        return [
            KVRow(
                layer=layer,
                layers=len(self._decoder.layers),
                key=entries(stored.keys, part),
                value=entries(stored.values, part),
                place=entries(held.place, part),
                visual=entries(held.visual, part),
                seen=int(held.seen[row]),
                generated=int(held.generated[row]),
                scaling=run.scaling,
                query=share(query, part),
                unrotated=share(unrotated, part),
                masses=None if run.state.masses is None else run.state.masses[row].to(stored.keys.device),
                ahead=None if run.ahead is None else run.ahead[layer][row],
                rotation=partial(self._rotation, newest - held_or_seen + 1),
            )
            for part in parts
        ]

    def _asked(self, run: KVRun, held: Held, row: int) -> Asked:
        if run.queries is None:
            return None, None
        asked = run.columns()[0][row].nonzero()[:, 0]
        visual = held.visual[row, 0][held.valid[row, 0]].nonzero()
        if self._needs.queries == "question" and len(visual):
            behind = int(held.valid[row, 0].sum()) - int(visual.max()) - 1
            asked = asked[-max(behind, 1) :]  # the image's last token asks where nothing stands behind it
        elif isinstance(self._needs.queries, int) and len(asked) > 1:
            asked = asked[len(asked) - min(self._needs.queries, len(asked)) :]
        query = run.queries[row][:, asked.to(run.queries.device)]
        if not self._needs.unrotated:
            return query, None
        assert run.rotary is not None
        rotary = (part.to(query.device).expand(len(run.current), -1, -1)[row] for part in run.rotary)
        cosine, sine = (part[asked.to(query.device)] for part in rotary)
        return query, unrotate(query.float(), (cosine.float(), sine.float()))

    def _rotation(self, ahead: int, place: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of text at `place`, where positions are `ahead` of places."""
        ids = (place + ahead)[None]
        mrope = "mrope_section" in (getattr(self._decoder.config, "rope_parameters", None) or {})
        cosine, sine = self._decoder.rotary_emb(place.float(), ids[None].expand(3, 1, -1) if mrope else ids)
        return cosine[0], sine[0]


def _aligned(rows: Sequence[Sequence[Tensor]], length: int) -> Tensor:
    """`[batch, kv_heads, length, ...]` of what every head of every row has, padded on the left."""
    padded = [[torch.cat([part.new_zeros(length - len(part), *part.shape[1:]), part]) for part in row] for row in rows]
    return torch.stack([torch.stack(heads) for heads in padded])


def _ahead(run: KVRun, stored: Any) -> list[Ahead]:
    """What each row asks in this pass, and with which keys."""
    assert run.queries is not None
    valid = run.current.to(stored.keys.device)
    keys = stored.keys[:, :, -valid.shape[1] :]
    return [Ahead(query[:, here], key[:, here]) for query, key, here in zip(run.queries, keys, valid, strict=True)]


def _before(run: KVRun, stored: Any) -> Held:
    """What a layer holds when a policy first sees it: what it `stored` before this pass."""
    past = run.past[:, : stored.keys.shape[2] - run.columns()[0].shape[1]]
    heads = stored.keys.shape[1]
    filled = run.filled.setdefault(("before", heads, past.shape[1]), _filled_by(past, heads))
    place = filled.valid.cumsum(dim=2) - 1
    return Held(filled, place, torch.zeros_like(filled.valid), torch.zeros_like(filled.seen))


def _filled_by(past: Tensor, heads: int) -> Filled:
    seen = past.sum(dim=1)
    return Filled(past[:, None].expand(-1, heads, -1), seen, torch.zeros_like(seen))
