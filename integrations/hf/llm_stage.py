"""The in-LLM stage: hooks on decoder layers between which visual tokens are removed while the prompt is read.

Before each layer of the method's choice, hidden states, rotary embeddings and masks lose what is removed; from there
on the layers see and store less. What later passes need is kept with the cache, per stretch of layers.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from mmcompress.budget import Budget
from mmcompress.compact import ragged_origin, renumber, take, take_positions
from mmcompress.encoder_method import Attention
from mmcompress.errors import SpecError, UnsupportedError
from mmcompress.integrations.hf.cache import CacheState, PrunedCache, Stretch, padding_mask
from mmcompress.integrations.hf.families import Family
from mmcompress.integrations.hf.taps import tap
from mmcompress.llm_method import LLMFacts, LLMMethod, LLMNeeds, PromptRow, RowAttention
from mmcompress.types import Positions, Selection

_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class _Probed(Exception):
    """Queries and keys are known; the rest of the attention is not wanted."""


@dataclass(frozen=True)
class Removed:
    """What was taken out before `layer`: see `compact.spread`."""

    layer: int
    keep: Tensor
    index: Tensor


@dataclass
class Prompt:
    """The columns of a batch that are left at some depth of the LLM.

    Args:
        valid: `[batch, columns]` bool, which are no padding.
        item: `[batch, columns]` number of the image or clip that a column is of and may be removed from, else -1.
        text: `[batch, columns]` bool, which are text.
        source: `[batch, columns]` the column of the LLM's input that each one is.
    """

    valid: Tensor
    item: Tensor
    text: Tensor
    source: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.source = torch.arange(self.valid.shape[1], device=self.valid.device).repeat(len(self.valid), 1)

    @property
    def visual(self) -> Tensor:
        """`[batch, columns]` bool, which may be removed."""
        return self.item >= 0

    def take(self, origin: Tensor) -> Prompt:
        """The columns `origin` `[batch, left]`, -1 where padded."""
        here = origin >= 0
        taken = Prompt(here, take(self.item, origin).masked_fill(~here, -1), take(self.text, origin) & here)
        taken.source = take(self.source, origin)
        return taken


@dataclass
class Run:
    """One pass of the text model on its way through the layers.

    Args:
        cache: where it stores keys and values.
        state: what the cache is to remember, changed on the way.
        current: `[batch, length]` which of the columns that entered are no padding.
        past: `[batch, stored]` which of the columns stored before are none.
        ids: their position ids `[..., batch, length]`.
        inputs: what entered `[batch, length, width]`.
        prompt: the columns, if visual ones are among them; None in passes that remove nothing.
        plans: per row how many visual tokens each layer of the method leaves.
        totals: per row how many entered.
        removed: what was taken out so far.
        replaced: what layers get instead of the model's own arguments.
        keys: `[batch, stored + columns]` which keys of the layer that ran last are no padding.
        through: what passed through the attention of the layer that ran last, if it is read.
        parts: what the layer that is running took in and gave out, if it is observed.
        observed: per observed layer what the method made of that `[batch, columns]`.
    """

    cache: PrunedCache | None
    state: CacheState
    current: Tensor
    past: Tensor
    ids: Tensor
    inputs: Tensor
    prompt: Prompt | None = None
    plans: list[list[int]] = field(default_factory=list)
    totals: list[int] = field(default_factory=list)
    removed: list[Removed] = field(default_factory=list)
    replaced: dict[str, Any] = field(default_factory=dict)
    keys: Tensor = field(init=False)
    through: dict[int, Attention] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)
    observed: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.keys = torch.cat([self.past, self.current], dim=1)


class _Local(threading.local):
    """What one thread is computing."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.probing: int | None = None


class LLMStage:
    """The hooks of one in-LLM method on one model."""

    def __init__(self, family: Family, method: LLMMethod, llm: LLMFacts, keep: Budget, positions: Positions) -> None:
        self.method, self.llm, self.keep, self.positions = method, llm, keep, positions
        self.cuts = method.layers(llm)
        self._needs: LLMNeeds = method.needs(llm)
        self._decoder: Any = family.base.get_decoder()
        self._local = _Local()
        layers = self._decoder.layers
        self._hooks = [
            layers[layer].register_forward_pre_hook(partial(self._before_layer, layer), with_kwargs=True)
            for layer in range(self.cuts[0], len(layers))
        ]
        for layer in self._needs.transitions:
            self._hooks += [
                getattr(layers[layer], part).register_forward_hook(partial(self._after_part, layer, part))
                for part in _PARTS
            ]
        read = {layer - 1 for layer in self.cuts if self._needs.previous}
        read |= {layer for layer in self.cuts if self._needs.upcoming}
        self._tapped: list[tuple[nn.Module, Any]] = []
        for layer in sorted(read):
            attention = layers[layer].self_attn
            self._tapped.append((attention, tap(attention, partial(self._collect, layer))))

    def remove(self) -> None:
        """Take every hook off, and give every module its own config back."""
        for hook in self._hooks:
            hook.remove()
        for attention, original in self._tapped:
            attention.config = original

    def plan(self, items: Sequence[int]) -> list[int]:
        """How many visual tokens each layer of the method leaves of a row with `items` of so many tokens."""
        tokens = sum(items)
        keep = sum(self.keep.tokens(item) for item in items)
        ratio = self.keep.keep if isinstance(self.keep.keep, float) else keep / max(tokens, 1)
        return self.method.plan(tokens, keep, ratio, self.llm)

    def begin(self, run: Run) -> None:
        """Follow a pass."""
        if run.prompt is not None:
            if self._decoder.training and getattr(self._decoder, "gradient_checkpointing", False):
                raise UnsupportedError(
                    "tokens cannot be removed inside the LLM under gradient checkpointing, which runs layers twice; "
                    "call model.gradient_checkpointing_disable()."
                )
            run.prompt.item[:, -1] = -1  # what is said next comes from there
            sizes = [row[row >= 0].unique(return_counts=True)[1].tolist() for row in run.prompt.item]
            run.totals = [sum(row) for row in sizes]
            run.plans = [self.plan(row) if row else [] for row in sizes]
        self._local.run = run

    def end(self) -> Run | None:
        """The pass that was followed, if there was one; nothing is followed any more."""
        run, self._local.run, self._local.probing = self._local.run, None, None
        return run

    def _before_layer(
        self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        run = self._local.run
        if run is None:
            return None
        hidden = args[0]
        if layer in self.cuts:
            kwargs = {**kwargs, **run.replaced}
            if run.prompt is not None:
                hidden = self._cut(run, run.prompt, layer, hidden, kwargs["position_embeddings"])
            elif layer in run.state.stretches:
                self._extend(run, run.state.stretches[layer], layer, hidden)
        return (hidden, *args[1:]), {**kwargs, **run.replaced, "position_ids": None}

    def _extend(self, run: Run, stretch: Stretch, layer: int, hidden: Tensor) -> None:
        """Go on behind a prompt of which this stretch of layers stored a part."""
        mask = torch.cat([_stored(stretch, run.cache, layer), run.current], dim=1)
        run.state.stretches[layer] = Stretch(mask, stretch.shift)
        run.replaced = {"attention_mask": self._mask(run, layer, hidden, mask)}
        if stretch.shift is not None:
            run.replaced["position_embeddings"] = self._rotary(hidden, run.ids - stretch.shift[:, None])

    def _rotary(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of position ids; those of M-RoPE may have a row in front that only tells of packing."""
        cosines, sines = self._decoder.rotary_emb(hidden, ids[-3:] if ids.dim() == 3 else ids)
        return cosines, sines

    def _cut(self, run: Run, prompt: Prompt, layer: int, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Remove tokens before `layer`: returns the hidden states that are left."""
        before = run.state.stretches.get(layer)
        past = run.past if before is None else _stored(before, run.cache, layer)
        rotary = rotary[0].expand(len(hidden), -1, -1), rotary[1].expand(len(hidden), -1, -1)
        keep, source = prompt.valid.clone(), torch.arange(hidden.shape[1], device=hidden.device).repeat(len(hidden), 1)
        number = self.cuts.index(layer)
        counts = prompt.visual.sum(dim=1).tolist()
        lefts = {row: plan[number] for row, plan in enumerate(run.plans) if plan and plan[number] < counts[row]}
        for row, (view, columns) in self._rows(run, prompt, lefts, layer, hidden, rotary, past).items():
            selection = self.method.reduce(view, lefts[row])
            members = columns[view.images]
            anchors = members[selection.anchor]
            slots = anchors.sort().values
            keep[row, members] = False
            keep[row, slots] = True
            source[row, slots] = anchors
            hidden = _absorb(hidden, row, members, anchors, selection)
        index, origin = ragged_origin(keep, source, pad_left=bool(prompt.valid[:, -1].all()))
        run.removed.append(Removed(layer, keep, index))
        run.observed = [take(seen, origin) for seen in run.observed]
        run.prompt = left_prompt = prompt.take(origin)
        hidden = take(hidden, origin)
        shift = None if before is None else before.shift
        if self.positions == "renumber":
            ids = run.ids if shift is None else run.ids - shift[:, None]
            ids, more = renumber(ids, run.current, take_positions(ids, origin), left_prompt.valid)
            shift = more if shift is None else shift + more
            rotary = self._rotary(hidden, ids)
        else:
            rotary = take(rotary[0], origin), take(rotary[1], origin)
        run.keys = torch.cat([past, left_prompt.valid], dim=1)
        run.state.stretches[layer] = Stretch(run.keys, shift)
        run.replaced = {"attention_mask": self._mask(run, layer, hidden, run.keys), "position_embeddings": rotary}
        return hidden

    def _mask(self, run: Run, layer: int, hidden: Tensor, mask: Tensor) -> Any:
        return create_causal_mask(
            config=self._decoder.config,
            inputs_embeds=hidden,
            attention_mask=padding_mask(mask, run.cache),
            past_key_values=run.cache,
            position_ids=None,
            layer_idx=layer,
        )

    def _rows(
        self,
        run: Run,
        prompt: Prompt,
        wanted: Collection[int],
        layer: int,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        past: Tensor,
    ) -> dict[int, tuple[PromptRow, Tensor]]:
        """By number, the `wanted` rows as the method sees them, and where their tokens are."""
        if not wanted:
            return {}
        needs, decoder = self._needs, self._decoder
        upcoming_keys = torch.cat([past, prompt.valid], dim=1)
        with torch.no_grad():
            states = hidden.detach()
            upcoming = self._probe(layer, states, rotary, run.cache) if needs.upcoming else None
            normed = decoder.norm(states) if needs.normed else None
            views = {}
            for row in wanted:
                columns = prompt.valid[row].nonzero()[:, 0]
                entered = run.current[row].nonzero()[:, 0]
                view = PromptRow(
                    layer=layer,
                    total=run.totals[row],
                    visual=prompt.visual[row, columns],
                    text=prompt.text[row, columns],
                    hidden=states[row, columns],
                    source=torch.searchsorted(entered, prompt.source[row, columns]),
                    previous=_row_attention(run.through.get(layer - 1), row, columns, run.keys),
                    upcoming=_row_attention(upcoming, row, columns, upcoming_keys),
                    observed=torch.stack([seen[row, columns] for seen in run.observed]) if run.observed else None,
                    inputs=run.inputs.detach()[row, entered] if needs.inputs else None,
                    normed=None if normed is None else normed[row, columns],
                    rotary=(rotary[0][row, columns], rotary[1][row, columns]) if needs.rotary else None,
                )
                views[row] = (view, columns)
        return views

    def _probe(self, layer: int, hidden: Tensor, rotary: tuple[Tensor, Tensor], cache: PrunedCache | None) -> Attention:
        """Queries and keys that `layer` would make of all tokens, earlier turns' keys in front."""
        module = self._decoder.layers[layer]
        self._local.probing = layer
        try:
            module.self_attn(
                hidden_states=module.input_layernorm(hidden),
                position_embeddings=rotary,
                attention_mask=None,
                past_key_values=None,
            )
        except _Probed:
            pass
        finally:
            self._local.probing = None
        run = self._local.run
        assert run is not None
        query, key, scaling = run.through.pop(layer)
        if cache is not None and cache.get_query_offset(layer):
            stored: Any = cache.layers[layer]
            key = torch.cat([stored.keys.to(key), key], dim=2)
        return Attention(query, key, scaling)

    def _collect(self, layer: int, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> None:
        run = self._local.run
        if run is None or run.prompt is None:
            return
        if self._local.probing == layer:
            run.through[layer] = Attention(query.detach(), key.detach(), kwargs["scaling"])
            raise _Probed
        if layer + 1 in self.cuts and self._needs.previous:
            run.through = {layer: Attention(query.detach(), key.detach(), kwargs["scaling"])}

    def _after_part(self, layer: int, part: str, module: Any, args: Any, output: Any) -> None:
        run = self._local.run
        if run is None or run.prompt is None or self._local.probing is not None:
            return
        run.parts[part] = (output[0] if isinstance(output, tuple) else output).detach()
        if part != _PARTS[-1]:
            return
        parts = run.parts
        seen = torch.zeros(run.prompt.valid.shape, device=parts["mlp"].device)
        with torch.no_grad():
            for row in run.prompt.visual.any(dim=1).nonzero()[:, 0].tolist():
                columns = run.prompt.valid[row].nonzero()[:, 0]
                own = [parts[name][row, columns] for name in _PARTS]
                seen[row, columns] = self.method.observe((own[0], own[1]), (own[2], own[3])).float()
        run.observed.append(seen)
        run.parts = {}


def _stored(stretch: Stretch, cache: PrunedCache | None, layer: int) -> Tensor:
    """Which of the columns that `layer` holds are no padding; an assistant's rejected tokens are cut off the cache."""
    return stretch.mask if cache is None else stretch.mask[:, : cache.get_query_offset(layer)]


def _row_attention(through: Attention | None, row: int, columns: Tensor, keys: Tensor) -> RowAttention | None:
    """One row of what passed; `keys` `[batch, past + columns]` tells which keys are no padding."""
    if through is None:
        return None
    return RowAttention(through.query[row][:, columns], through.key[row][:, keys[row]], through.scaling)


def _absorb(hidden: Tensor, row: int, members: Tensor, anchors: Tensor, selection: Selection) -> Tensor:
    if selection.weight is None:
        return hidden
    merged = hidden.clone()
    merged[row, anchors] = selection.apply(hidden[row, members])
    return merged


def llm_facts(family: Family) -> LLMFacts:
    """The language model as methods see it."""
    decoder: Any = family.base.get_decoder()
    return LLMFacts(len(decoder.layers), decoder.config.num_attention_heads)


def require_in_llm(family: Family, method: LLMMethod, llm: LLMFacts) -> None:
    """Refuse what tokens cannot be removed from between decoder layers.

    Raises:
        SpecError: the method's layers do not fit the model.
        UnsupportedError: the model's layers cannot lose tokens there.
    """
    decoder: Any = family.base.get_decoder()
    name, model = method.info.name, type(family.base).__name__
    cuts = method.layers(llm)
    if cuts[-1] >= llm.layers:
        raise SpecError(f"{name} removes tokens before layer {cuts[-1]}, but the LLM has layers 0..{llm.layers - 1}.")
    levels = len(getattr(family.config.vision_config, "deepstack_visual_indexes", None) or ())
    if cuts[0] < levels:
        raise UnsupportedError(
            f"{name} would remove tokens before layer {cuts[0]}, but {model} adds visual features to its first "
            f"{levels} layers (DeepStack); tokens can be removed from layer {levels} on."
        )
    missing = [part for part in _PARTS if not hasattr(decoder.layers[0], part)]
    if missing and method.needs(llm).transitions:
        raise UnsupportedError(f"{name} observes {missing[0]} of decoder layers, which those of {model} do not have.")
