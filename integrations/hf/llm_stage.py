"""The in-LLM stage: hooks on decoder layers between which visual tokens are removed while the prompt is read.

Before each layer of the method's choice, hidden states, rotary embeddings and masks lose what is removed; from there
on the layers see and store less. What later passes need is kept with the cache, per stretch of layers.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.budget import Budget
from mmcompress.compact import ragged_origin, renumber, take, take_positions
from mmcompress.encoder_method import Attention
from mmcompress.errors import SpecError, UnsupportedError
from mmcompress.integrations.hf.attached import Attached
from mmcompress.integrations.hf.cache import PrunedCache, Stretch, layer_mask
from mmcompress.integrations.hf.families import Family
from mmcompress.integrations.hf.llm_run import Prompt, Removed, Run
from mmcompress.integrations.hf.renamed import CACHE
from mmcompress.integrations.hf.taps import tap
from mmcompress.llm_method import LLMFacts, LLMMethod, LLMNeeds, PromptRow, RowAttention
from mmcompress.types import Positions, Selection

# Lengths are decided there, so a compiled model runs these parts as they are.
eagerly = torch.compiler.disable(
    reason="mmcompress decides here how many tokens are left, which cannot be compiled; leave out fullgraph=True."
)
_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class _Probed(Exception):
    """Queries and keys are known; the rest of the attention is not wanted."""


class _Local(threading.local):
    """What one thread is computing."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.probing: int | None = None


class LLMStage(Attached):
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
        if self.keep.average:
            share = self.keep.keep
            return self.method.plan_average(tokens, share * tokens if isinstance(share, float) else keep, self.llm)
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
            asked = run.prompt.asked
            last = (asked * torch.arange(asked.shape[1], device=asked.device)).argmax(dim=1, keepdim=True)
            run.prompt.item.scatter_(1, last, -1)  # what is said next comes from there
            sizes = [row[row >= 0].unique(return_counts=True)[1].tolist() for row in run.prompt.item]
            run.totals = [sum(row) for row in sizes]
            run.plans = [self.plan(row) if row else [] for row in sizes]
        else:
            for layer in sorted(run.state.stretches):
                self._extend(run, layer)
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
        if run.prompt is not None and layer in self.cuts:
            rotary = {**kwargs, **run.replaced.get(layer, {})}["position_embeddings"]
            hidden = self._cut(run, run.prompt.to(hidden.device), layer, hidden, rotary)
        return (hidden, *args[1:]), {**kwargs, **run.replaced.get(layer, {})}

    def _extend(self, run: Run, layer: int) -> None:
        """Go on behind a prompt of which the layers from `layer` on stored a part."""
        stretch = run.state.stretches[layer]
        mask = torch.cat([_stored(stretch, run.cache, layer, run.current.device), run.current], dim=1)
        run.state.stretches[layer] = Stretch(mask, stretch.shift)
        replaced: dict[str, Any] = {"attention_mask": self._mask(run, layer, run.inputs, mask)}
        if stretch.shift is not None:
            ids = run.ids - stretch.shift.to(run.ids.device)[:, None]
            replaced |= {"position_embeddings": self._rotary(run.inputs, ids), "position_ids": ids}
        run.replaced |= dict.fromkeys(range(layer, self.llm.layers), replaced)

    def _rotary(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of position ids; those of M-RoPE may have a row in front that only tells of packing."""
        cosines, sines = self._decoder.rotary_emb(hidden, ids[-3:] if ids.dim() == 3 else ids)
        return cosines.to(hidden.device), sines.to(hidden.device)

    @eagerly
    def _cut(self, run: Run, prompt: Prompt, layer: int, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Remove tokens before `layer`: returns the hidden states that are left.

        Layers may lie on several devices: all that is needed is brought to that of `hidden`.
        """
        device = hidden.device
        before = run.state.stretches.get(layer)
        past = run.past.to(device) if before is None else _stored(before, run.cache, layer, device)
        rotary = rotary[0].to(device).expand(len(hidden), -1, -1), rotary[1].to(device).expand(len(hidden), -1, -1)
        keep, source = prompt.valid.clone(), torch.arange(hidden.shape[1], device=device).repeat(len(hidden), 1)
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
        run.observed = [take(seen.to(device), origin) for seen in run.observed]
        run.prompt = left_prompt = prompt.take(origin)
        hidden = take(hidden, origin)
        shift = None if before is None or before.shift is None else before.shift.to(device)
        if self.positions == "renumber":
            ids, current = run.ids.to(device), run.current.to(device)
            ids = ids if shift is None else ids - shift[:, None]
            ids, more = renumber(ids, current, take_positions(ids, origin), left_prompt.valid)
            shift = more if shift is None else shift + more
            rotary = self._rotary(hidden, ids)
        else:
            ids = take_positions(run.ids.to(device), left_prompt.source)
            rotary = take(rotary[0], origin), take(rotary[1], origin)
        run.keys = torch.cat([past, left_prompt.valid], dim=1)
        run.state.stretches[layer] = Stretch(run.keys, shift)
        replaced = {
            "attention_mask": self._mask(run, layer, hidden, run.keys),
            "position_embeddings": rotary,
            "position_ids": ids,
        }
        run.replaced |= dict.fromkeys(range(layer, self.llm.layers), replaced)
        return hidden

    def _mask(self, run: Run, layer: int, hidden: Tensor, mask: Tensor) -> Any:
        return layer_mask(self._decoder.config, hidden, mask, run.cache, layer)

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
        needs, decoder, device = self._needs, self._decoder, hidden.device
        asked, entered_at = prompt.asked, run.inputs.shape[1] - prompt.tail
        previous_keys = run.keys[:, : run.keys.shape[1] - prompt.tail].to(device)
        upcoming_keys = torch.cat([past, asked], dim=1)
        with torch.no_grad():
            states = hidden.detach()
            upcoming = self._probe(layer, states, rotary, run.cache) if needs.upcoming else None
            normed = decoder.norm(states).to(device) if needs.normed else None
            observed = torch.stack([seen.to(device) for seen in run.observed]) if run.observed else None
            views = {}
            for row in wanted:
                columns = asked[row].nonzero()[:, 0]
                entered = run.current[row, :entered_at].nonzero()[:, 0].to(device)
                view = PromptRow(
                    layer=layer,
                    total=run.totals[row],
                    visual=prompt.visual[row, columns],
                    text=prompt.text[row, columns],
                    hidden=states[row, columns],
                    source=torch.searchsorted(entered, prompt.source[row, columns]),
                    previous=_row_attention(run.through.get(layer - 1), row, columns, previous_keys),
                    upcoming=_row_attention(upcoming, row, columns, upcoming_keys),
                    observed=None if observed is None else observed[:, row, columns],
                    inputs=run.inputs.detach().to(device)[row, entered] if needs.inputs else None,
                    normed=None if normed is None else normed[row, columns],
                    rotary=(rotary[0][row, columns], rotary[1][row, columns]) if needs.rotary else None,
                )
                views[row] = (view, columns)
        return views

    def _probe(self, layer: int, hidden: Tensor, rotary: tuple[Tensor, Tensor], cache: PrunedCache | None) -> Attention:
        """Queries and keys that `layer` would make of all tokens, earlier turns' keys in front."""
        module = self._decoder.layers[layer]
        place = next(module.parameters()).device
        if place.type != "meta":  # else the hooks that load its weights bring its inputs there
            hidden, rotary = hidden.to(place), (rotary[0].to(place), rotary[1].to(place))
        self._local.probing = layer
        try:
            module.self_attn(
                hidden_states=module.input_layernorm(hidden),
                position_embeddings=rotary,
                attention_mask=None,
                **{CACHE: None},
            )
        except _Probed:
            pass
        finally:
            self._local.probing = None
        run = self._local.run
        assert run is not None
        query, key, scaling = run.through.pop(layer)
        if cache is not None and (length := cache.stored(layer)):
            stored: Any = cache.layers[layer]
            key = torch.cat([stored.keys[:, :, :length].to(key), key], dim=2)
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
        if part == _PARTS[-1]:
            self._observe(run, run.prompt)

    @eagerly
    def _observe(self, run: Run, prompt: Prompt) -> None:
        parts = run.parts
        asked = prompt.asked.to(parts["mlp"].device)
        seen = torch.zeros(asked.shape, device=asked.device)
        with torch.no_grad():
            for row in prompt.visual.any(dim=1).nonzero()[:, 0].tolist():
                columns = asked[row].nonzero()[:, 0]
                own = [parts[name][row, columns] for name in _PARTS]
                seen[row, columns] = self.method.observe((own[0], own[1]), (own[2], own[3])).float()
        run.observed.append(seen)
        run.parts = {}


def _stored(stretch: Stretch, cache: PrunedCache | None, layer: int, device: torch.device) -> Tensor:
    """Which of the columns that `layer` holds are no padding; an assistant's rejected tokens are cut off the cache."""
    mask = stretch.mask.to(device)
    return mask if cache is None else mask[:, : cache.stored(layer)]


def _row_attention(through: Attention | None, row: int, columns: Tensor, keys: Tensor) -> RowAttention | None:
    """One row of what passed; `keys` `[batch, past + columns]` tells which of the first keys count."""
    if through is None:
        return None
    query, key = through.query[row].to(columns.device), through.key[row, :, : keys.shape[1]].to(columns.device)
    return RowAttention(query[:, columns], key[:, keys[row]], through.scaling)


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
