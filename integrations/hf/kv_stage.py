"""The KV stage: hooks on decoder layers that take entries out of a layer's cache as soon as its attention has run.

What a layer holds is kept with the cache, per row and KV head: masks of later passes are built from it, layer by layer.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import rotate_half

from mmcompress.budget import Budget
from mmcompress.errors import UnsupportedError
from mmcompress.integrations.hf.cache import CacheState, Held, PrunedCache, layer_mask
from mmcompress.integrations.hf.families import Family
from mmcompress.integrations.hf.llm_stage import Run
from mmcompress.integrations.hf.taps import tap
from mmcompress.kv_policy import Evictor, KVRow


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
        inside: the same pass on its way through layers that lose tokens.
        queries: what the layer that is running asks, `[batch, heads, columns, dim]`.
        scaling: factor on its logits.
        rotary: its cosines and sines.
    """

    cache: PrunedCache
    state: CacheState
    current: Tensor
    visual: Tensor
    past: Tensor
    ids: Tensor
    said: int
    inside: Run | None = None
    queries: Tensor | None = None
    scaling: float = 1.0
    rotary: tuple[Tensor, Tensor] | None = None

    def columns(self) -> tuple[Tensor, Tensor]:
        """Which of the columns that are left at this depth are no padding, and which are visual tokens."""
        prompt = None if self.inside is None else self.inside.prompt
        return (self.current, self.visual) if prompt is None else (prompt.valid, prompt.visual)


class _Local(threading.local):
    """What one thread is computing."""

    def __init__(self) -> None:
        self.run: KVRun | None = None


class KVStage:
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
        mask = torch.cat([held.valid, run.columns()[0]], dim=1)
        return args, {**kwargs, "attention_mask": layer_mask(self._decoder.config, args[0], mask, run.cache, layer)}

    def _collect(self, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> None:
        if self._local.run is not None:
            self._local.run.queries, self._local.run.scaling = query.detach(), kwargs["scaling"]

    @torch.no_grad()
    def _after_attention(self, layer: int, module: Any, args: Any, output: Any) -> None:
        run = self._local.run
        if run is None:
            return
        stored: Any = run.cache.layers[layer]
        held = _extended(run, layer, stored.keys.shape[1], run.cache.stored(layer))
        brings_prompt = layer not in run.state.held or run.current.shape[1] - run.said > 1
        if brings_prompt or self.policy.schedule == "step":
            held = self._evict(run, layer, held, brings_prompt)
        run.state.held[layer] = held

    def _evict(self, run: KVRun, layer: int, held: Held, brings_prompt: bool) -> Held:
        stored: Any = run.cache.layers[layer]
        capacity, observed = held.capacity.clone(), held.observed
        views: list[KVRow] = []
        choices: list[list[Tensor]] = []
        chosen: list[Tensor] = []
        for row in range(len(held.valid)):
            columns = held.valid[row].nonzero()[:, 0]
            if brings_prompt:
                capacity[row] = self._capacity(held.visual[row][:, columns])
            view = self._view(run, layer, held, row, columns)
            if self._counts:
                if observed is None:
                    observed = torch.zeros(held.place.shape, device=held.place.device)
                observed[row][:, columns] += self.policy.observe(view)
                view = replace(view, observed=observed[row][:, columns])
            kept = [torch.arange(len(columns), device=columns.device)] * len(view.key)
            if len(columns) > capacity[row]:
                kept = self.policy.select(view, int(capacity[row]))
            if len({len(entries) for entries in kept}) > 1:
                raise UnsupportedError(
                    f"{self.policy.info.name} keeps another number of entries in every head, which this engine's "
                    "caches cannot hold."
                )
            views.append(view)
            choices.append(kept)
            chosen.append(columns[torch.stack(kept)])
        held = replace(held, capacity=capacity, observed=observed)
        length, left = held.valid.shape[1], max(entries.shape[1] for entries in chosen)
        if left == length:
            return held
        index = torch.stack([nn.functional.pad(entries, (left - entries.shape[1], 0)) for entries in chosen])
        valid = torch.stack([torch.arange(left, device=index.device) >= left - entries.shape[1] for entries in chosen])
        rows = [self.policy.hold(view, kept) for view, kept in zip(views, choices, strict=True)]
        stored.keys, stored.values = (
            torch.stack([nn.functional.pad(torch.stack(part), (0, 0, left - len(part[0]), 0)) for part in parts])
            for parts in zip(*rows, strict=True)
        )
        stored.dropped += length - left
        return Held(
            valid=valid,
            place=held.place.gather(2, index),
            visual=held.visual.gather(2, index),
            seen=held.seen,
            generated=held.generated,
            capacity=capacity,
            observed=None if observed is None else observed.gather(2, index),
        )

    def _capacity(self, visual: Tensor) -> int:
        """How many entries per head a row may hold; those out of scope stay on top of the budget."""
        entries = visual.shape[1]
        scoped = entries if self.policy.scope == "all" else int((visual[0] == (self.policy.scope == "visual")).sum())
        return entries - scoped + (self.keep.keep if isinstance(self.keep.keep, int) else self.keep.tokens(scoped))

    def _view(self, run: KVRun, layer: int, held: Held, row: int, columns: Tensor) -> KVRow:
        stored: Any = run.cache.layers[layer]
        view = KVRow(
            layer=layer,
            layers=len(self._decoder.layers),
            key=stored.keys[row][:, columns],
            value=stored.values[row][:, columns],
            place=held.place[row][:, columns],
            visual=held.visual[row][:, columns],
            seen=int(held.seen[row]),
            generated=int(held.generated[row]),
            scaling=run.scaling,
            rotation=partial(self._rotation, int(run.ids[..., row, -1].max()) - int(held.seen[row]) + 1),
        )
        if run.queries is None:
            return view
        asked = run.columns()[0][row].nonzero()[:, 0]
        if self._needs.queries == "question" and bool(view.visual.any()):
            asked = asked[-(view.entries - int(view.visual[0].nonzero().max()) - 1) :]
        elif isinstance(self._needs.queries, int) and len(asked) > 1:
            asked = asked[len(asked) - min(self._needs.queries, len(asked)) :]
        query = run.queries[row][:, asked]
        if not self._needs.unrotated:
            return replace(view, query=query)
        assert run.rotary is not None
        cosine, sine = (part.expand(len(run.current), -1, -1)[row, asked] for part in run.rotary)
        return replace(view, query=query, unrotated=query * cosine - rotate_half(query) * sine)

    def _rotation(self, ahead: int, place: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of text at `place`, where positions are `ahead` of places."""
        ids = (place + ahead)[None]
        mrope = "mrope_section" in (getattr(self._decoder.config, "rope_parameters", None) or {})
        cosine, sine = self._decoder.rotary_emb(place.float(), ids[None].expand(3, 1, -1) if mrope else ids)
        return cosine[0], sine[0]


def _extended(run: KVRun, layer: int, heads: int, length: int) -> Held:
    """What a layer holds of `length` columns, once those of this pass are stored behind what it held before."""
    valid, visual = run.columns()
    before = run.state.held.get(layer)
    if before is None:
        past = run.past[:, : length - valid.shape[1]]
        counted = (past.cumsum(dim=1) - 1)[:, None].expand(-1, heads, -1)
        nothing = torch.zeros(len(valid), dtype=torch.long, device=valid.device)
        before = Held(past, counted, torch.zeros_like(counted, dtype=torch.bool), past.sum(dim=1), nothing, nothing)
    added = valid.sum(dim=1)
    place = before.seen[:, None] + valid.cumsum(dim=1) - 1
    observed = before.observed
    if observed is not None:
        observed = torch.cat([observed, observed.new_zeros(*observed.shape[:2], valid.shape[1])], dim=2)
    return Held(
        valid=torch.cat([before.valid, valid], dim=1),
        place=torch.cat([before.place, place[:, None].expand(-1, heads, -1)], dim=2),
        visual=torch.cat([before.visual, visual[:, None].expand(-1, heads, -1)], dim=2),
        seen=before.seen + added,
        generated=before.generated + (added if valid.shape[1] == 1 else 0),
        capacity=before.capacity,
        observed=observed,
    )
