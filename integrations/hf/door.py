"""The pruning door: hooks on the text model through which every prompt enters compressed.

The model's own merging of features into embeddings stays untouched. At the text model's entrance the visual tokens
are compressed for real (embeddings, positions, masks, DeepStack planes), at its exit hidden states are spread back
to the prompt's length, and the cache remembers how many tokens it never saw.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from mmcompress.accounting import ItemStats, LLMShape, Stats
from mmcompress.budget import Budget
from mmcompress.compact import ragged_origin, renumber, spread, take, take_positions
from mmcompress.encoder_method import EncoderMethod
from mmcompress.errors import UnsupportedError
from mmcompress.integrations.hf.cache import (
    CacheState,
    PrunedCache,
    PrunedStaticCache,
    adopt,
    layer_mask,
    padding_mask,
)
from mmcompress.integrations.hf.clock import Span, StageClock
from mmcompress.integrations.hf.draft import Draft, Reading, Told
from mmcompress.integrations.hf.encoder_stage import EncoderStage
from mmcompress.integrations.hf.families import Family
from mmcompress.integrations.hf.generation import FEATURE_INPUTS, Generation
from mmcompress.integrations.hf.kv_stage import KVRun, KVStage
from mmcompress.integrations.hf.llm_stage import LLMStage, Prompt, Run, eagerly
from mmcompress.integrations.hf.placement import Placed, place_items
from mmcompress.integrations.hf.projector_stage import ProjectorStage
from mmcompress.integrations.hf.quant_stage import QuantStage
from mmcompress.integrations.hf.sparse_stage import SparseStage
from mmcompress.integrations.hf.text_tower import TextTower
from mmcompress.integrations.hf.vision import Encoded, Vision
from mmcompress.kv_policy import Ahead
from mmcompress.method import VisualMethod, require_finite
from mmcompress.projector_method import ProjectorMethod
from mmcompress.types import EncoderFacts, Modality, Needs, Positions, Selection, Trace


@dataclass
class Call:
    """One pass of the text model on its way through the door.

    Args:
        span: the time it takes; None if the pass is left as it is.
        visual: `[batch, length]` placeholder masks by modality; empty where no features arrived.
        cache: the adopted cache.
        seen: how many tokens went before.
        tail: how many of the last columns were said after the prompt.
        state: what `cache` is to remember once the pass has succeeded.
        removal: which columns stayed, if it removes any.
        drafted: `[batch, layers, columns]`, what a method made of a draft's attention; None if it needs none.
        ahead: where to note what is asked, if its tokens are such as a draft expects and are to be forgotten.
    """

    span: Span | None = None
    visual: dict[Modality, Tensor] = field(default_factory=dict)
    cache: PrunedCache | None = None
    seen: int = 0
    tail: int = 0
    state: CacheState = field(default_factory=CacheState)
    removal: Removal | None = None
    drafted: Tensor | None = None
    ahead: dict[int, list[Ahead]] | None = None


@dataclass(frozen=True)
class Removal:
    """What a prefill took out.

    Args:
        keep: `[batch, length]` which columns stayed.
        index: `[batch, kept]` where they came from, -1 where padded.
        stats: what that saves.
        trace: what became of every item.
        clock: the time so far.
    """

    keep: Tensor
    index: Tensor
    stats: Stats
    trace: list[Trace]
    clock: StageClock


class _Forward(threading.local):
    """What one thread's forward pass carries from hook to hook."""

    def __init__(self) -> None:
        self.ids: Tensor | None = None
        self.visual: dict[Modality, Tensor] = {}
        self.call = Call()


class Door:
    """The hooks of the pre-LLM stage on one model, through which what the encoder stage left goes too."""

    def __init__(
        self,
        family: Family,
        method: VisualMethod | EncoderMethod | ProjectorMethod | None,
        needs: Needs,
        encoder: EncoderFacts,
        keep: Budget,
        positions: Positions,
        model: Any,
        llm_stage: LLMStage | None = None,
        kv_stage: KVStage | SparseStage | QuantStage | None = None,
        draft: Draft | None = None,
    ) -> None:
        self._family = family
        self._method = method
        self._needs = Needs(embeddings=True) if isinstance(method, EncoderMethod) else needs
        self.llm_stage = llm_stage
        self.kv_stage = kv_stage
        self._draft = draft
        self._lookahead = 0 if kv_stage is None else kv_stage.policy.needs().lookahead
        self._positions = positions
        self._stage: EncoderStage | ProjectorStage | None = None
        self._projector = None
        if isinstance(method, EncoderMethod):
            self._stage = EncoderStage(family, method, needs, encoder, keep)
        elif isinstance(method, ProjectorMethod):
            self._stage = ProjectorStage(family, method, keep)
        elif method is not None and method.space == "pre_projector":
            self._projector = family.projector
        self._text_tower = None if needs.text_tower is None else TextTower(needs.text_tower, family)
        self._decoder: Any = family.base.get_decoder()
        self._forward = _Forward()
        self._keep = keep
        self.clock = StageClock()
        self.stats: Stats | None = None
        self.trace: list[Trace] = []
        self.kv_layers: list[tuple[int, int]] | None = None
        self.vision = Vision(family, self._needs, self._projector, self._stage, keeps_inputs=draft is not None)
        changing = None if isinstance(kv_stage, SparseStage) else kv_stage
        self._generation = Generation(model, "" if changing is None else f"KV policy {changing.policy.info.name}")
        base, decoder = family.base, self._decoder
        self._hooks = [
            base.register_forward_pre_hook(self._before_base, with_kwargs=True),
            base.register_forward_hook(self._after_base, with_kwargs=True, always_call=True),
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, with_kwargs=True),
            *(layer.register_forward_pre_hook(self._before_layer, with_kwargs=True) for layer in decoder.layers),
        ]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError("a wrapped model cannot be copied or pickled; unwrap it first.")

    @property
    def _newlines(self) -> bool:
        if isinstance(self._stage, ProjectorStage):
            return not self._stage.pools  # pooled tiles have newlines of their own
        return not isinstance(self._method, VisualMethod) or self._method.newlines

    @property
    def keep(self) -> Budget:
        """The budget in force."""
        return self._keep

    @keep.setter
    def keep(self, keep: Budget) -> None:
        if self._stage is not None:
            self._stage.keep = keep
        self._keep = keep

    @property
    def kv_held(self) -> int | None:
        """See `Stats.kv_held`."""
        if self.kv_stage is None or self.kv_layers is None:
            return None
        return sum(held for held, _ in self.kv_layers)

    @property
    def kv_read(self) -> list[int] | None:
        """See `Stats.kv_read`."""
        return self.kv_stage.read if isinstance(self.kv_stage, SparseStage) else None

    def remove(self) -> None:
        """Take every hook off."""
        for hook in self._hooks:
            hook.remove()
        self._generation.remove()
        self.vision.remove()
        for stage in (self.kv_stage, self.llm_stage):  # both may have tapped a layer; the last tap goes first
            if stage is not None:
                stage.remove()

    @eagerly
    def _before_base(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A keyboard interrupt skips the hook after the pass: every pass begins by forgetting the last.
        self._forward.visual, self._forward.call = {}, Call()
        self._end_stages()
        outputs = kwargs.get("mm_encoder_outputs") or {}
        self._forward.ids = ids = kwargs.get("input_ids", args[0] if args else None)
        self.vision.begin(outputs)
        # The token ids alone would not tell: a generated token may equal the placeholder.
        if not outputs and all(kwargs.get(name) is None for name in FEATURE_INPUTS):
            return
        for modality, token in self._family.token_ids.items():
            if ids is not None:
                self._forward.visual[modality] = ids == token
            else:
                embeds = kwargs["inputs_embeds"]
                placeholder = module.get_input_embeddings()(torch.tensor(token, device=embeds.device))
                self._forward.visual[modality] = (embeds == placeholder).all(dim=-1)

    @eagerly
    def _after_base(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._forward.call.cache is not None:
            self._forward.call.cache.entered = False
        self._end_stages()
        self._forward.visual, self._forward.call = {}, Call()
        self.vision.end()

    def _end_stages(self) -> None:
        for stage in (self.llm_stage, self.kv_stage):
            if stage is not None:
                stage.end()

    @eagerly
    def _before_decoder(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        visual, cache = self._forward.visual, kwargs.get("past_key_values")
        ahead = self._forward.call.ahead
        self._forward.call = Call()
        if not visual and not isinstance(cache, PrunedCache) and self.kv_stage is None and self._draft is None:
            return None
        if cache is None and (module.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]):
            cache = DynamicCache(config=module.config)
        call = Call(Span(kwargs["inputs_embeds"].device), visual, ahead=ahead)
        if cache is None and self.kv_stage is not None:
            raise UnsupportedError(
                f"KV policy {self.kv_stage.policy.info.name} acts on a cache, but use_cache=False; leave that "
                "out, or unwrap the model."
            )
        if cache is not None:
            call.cache = adopt(cache)
            call.state = call.cache.state.copy()
            call.cache.entered = True
        self._forward.call = call
        return args, self._compress(kwargs, call)

    def _compress(self, kwargs: dict[str, Any], call: Call) -> dict[str, Any]:
        embeds: Tensor = kwargs["inputs_embeds"]
        batch, length = embeds.shape[:2]
        state = call.state
        self._require_same_layers(state)
        call.seen = 0 if call.cache is None else int(call.cache.get_seq_length())
        call.tail = self._generation.said(call.seen + length)
        current, past = self._masks(kwargs.get("attention_mask"), call, batch, length, embeds.device)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(call.seen, call.seen + length, device=embeds.device)[None]
        positions = positions.to(embeds.device).expand(*positions.shape[:-2], batch, length)
        if self._draft is not None and call.ahead is None:
            self._tell(self._draft, call, current, positions)
        if state.shift is not None:
            positions = positions - state.shift[:, None]
        kwargs = {**kwargs, "past_key_values": call.cache}

        valid, prompt = current, None
        if call.visual:
            kwargs, prompt, positions = self._remove_tokens(kwargs, call, current, positions)
            valid = prompt.valid
        if positions.dim() == 3 and positions.shape[0] == 4:  # row 0 of Qwen's ids only serves to detect packing
            positions = positions.clone()
            positions[0] = (valid.cumsum(dim=1) - 1).clamp(min=0) + past.shape[1]

        state.mask = torch.cat([past, valid], dim=1)
        kwargs["attention_mask"] = (
            layer_mask(self._decoder.config, kwargs["inputs_embeds"], state.mask, call.cache)
            if isinstance(call.cache, PrunedStaticCache)  # of the same shape in every step of decoding
            else padding_mask(state.mask, call.cache)
        )
        kwargs["position_ids"] = positions
        if self.llm_stage is not None:
            run = Run(call.cache, state, valid, past, positions, kwargs["inputs_embeds"], prompt)
            self.llm_stage.begin(run)
        if self.kv_stage is not None and call.cache is not None:
            seen = torch.zeros_like(valid) if prompt is None else prompt.visual
            inside = None if self.llm_stage is None else run
            kv_run = KVRun(call.cache, state, valid, seen, past, positions, call.tail, call.seen + length, inside)
            if self._draft is not None and self._lookahead:
                kv_run.look_ahead, kv_run.ahead = partial(self._look_ahead, self._draft, call), call.ahead
            self.kv_stage.begin(kv_run)
        return kwargs

    def _tell(self, draft: Draft, call: Call, current: Tensor, positions: Tensor) -> None:
        """Tell the draft what the model is told; it reads at once where a method depends on it."""
        if self._forward.ids is None:
            raise UnsupportedError("a draft reads token ids; pass input_ids, not inputs_embeds.")
        if call.state.reading is None and call.seen:
            return  # it missed the beginning, which matters only if it is asked
        positions = positions[-3:] if positions.dim() == 3 else positions
        told = Told(self._forward.ids.to(current.device), current, positions)
        reads = bool(call.visual) and self._needs.draft is not None
        prompt, said = told.split(told.ids.shape[1] - (call.tail if reads else 0))
        call.state.reading = draft.hear(call.state.reading, prompt)
        if reads:
            observed = self._read(draft, call).observed
            assert observed is not None
            call.drafted = observed[..., -prompt.ids.shape[1] :]  # what was said since the last prompt is read with it
            call.state.reading = draft.hear(call.state.reading, said)

    def _read(self, draft: Draft, call: Call) -> Reading:
        """All that the draft was told, read."""
        reading = call.state.reading
        if reading is None:
            raise UnsupportedError("the draft has not read what this cache holds; start a new cache.")
        if reading.unread is None:
            return reading
        inputs: dict[str, Tensor] = {}
        copies = 1
        for modality, encoded in self.vision.pending.items():
            inputs |= encoded.inputs
            features = sum(len(layout.separator) for layout in encoded.layouts)
            copies = max(1, int(call.visual[modality].sum()) // features)
        call.state.reading = reading = draft.read(reading, inputs, copies)
        return reading

    @torch.no_grad()
    def _look_ahead(self, draft: Draft, call: Call) -> dict[int, list[Ahead]]:
        """Read what the draft expects behind a prompt, for what is asked there, and forget it again."""
        told = draft.expect(self._read(draft, call), self._lookahead)
        ahead: dict[int, list[Ahead]] = {}
        visual, self._forward.visual, self._forward.call = self._forward.visual, {}, Call(ahead=ahead)
        try:
            self._decoder(
                inputs_embeds=self._family.base.get_input_embeddings()(told.ids),
                attention_mask=told.valid.long(),
                position_ids=told.positions,
                past_key_values=call.cache,
                use_cache=True,
            )
        finally:
            self._forward.visual, self._forward.call = visual, call
        assert call.cache is not None
        call.cache.crop(-told.ids.shape[1])
        call.cache.state = call.state
        return ahead

    def _require_same_layers(self, state: CacheState) -> None:
        if state.held and self.kv_stage is None:
            raise UnsupportedError(
                "a KV policy took entries out of this cache; go on with a policy, or start a new cache."
            )
        if state.quantiser is not None and not isinstance(self.kv_stage, QuantStage):
            raise UnsupportedError(
                f"this cache holds what {state.quantiser.info.name} packed; go on with that policy, or start a new "
                "cache."
            )
        layers = [] if self.llm_stage is None else [*self.llm_stage.cuts]
        if state.stretches and sorted(state.stretches) != layers:
            raise UnsupportedError(
                f"this cache lost tokens before layers {sorted(state.stretches)}, but here they are removed before "
                f"layers {layers}; go on with the method it began with, or start a new cache."
            )

    def _masks(self, mask: Any, call: Call, batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which of the new columns, and which of the stored ones, are real: `[batch, length]`, `[batch, stored]`."""
        stored = 0 if call.cache is None else call.cache.stored()
        if isinstance(call.cache, PrunedStaticCache):
            mask = _columns(mask, call.cache, call.seen, length)
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.bool, device=device)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise UnsupportedError(
                "compression needs a 2-D attention mask [batch, length]; custom 4-D masks are not supported."
            )
        mask = mask.to(device).bool()
        past = call.state.mask
        if past is None:
            past = mask[:, :-length] if mask.shape[1] == stored + length else mask.new_ones(batch, stored)
        past = past[:, :stored]
        if past.shape[1] < stored:
            past = torch.cat([past, past.new_ones(batch, stored - past.shape[1])], dim=1)
        return mask[:, -length:], past

    def _remove_tokens(
        self, kwargs: dict[str, Any], call: Call, current: Tensor, positions: Tensor
    ) -> tuple[dict[str, Any], Prompt, Tensor]:
        embeds: Tensor = kwargs["inputs_embeds"]
        length, span = embeds.shape[1], Span(embeds.device)
        pending = self.vision.pending
        asked = current.clone()
        asked[:, length - call.tail :] = False
        placed = place_items(
            self._family, self._needs, pending, embeds, call.visual, asked, self._text_tower, self._forward.ids
        )
        if call.drafted is not None:
            placed = [entry.with_drafted(call.drafted) for entry in placed]
        selections = self._select(placed)

        keep, source = current.clone(), torch.arange(length, device=embeds.device).repeat(len(embeds), 1)
        visual = torch.stack([mask.to(embeds.device) for mask in call.visual.values()]).any(dim=0)
        item = torch.full_like(source, -1)
        if not self._newlines:
            keep &= ~visual
        for number, (entry, selection) in enumerate(zip(placed, selections, strict=True)):
            rows = torch.tensor(entry.rows, device=embeds.device)[:, None]
            anchors = entry.positions[selection.anchor]
            keep[rows, entry.positions] = False
            keep[rows, anchors] = True
            item[rows, anchors] = number
            source[rows, anchors.sort().values] = anchors
        index, origin = ragged_origin(keep, source, pad_left=bool(current[:, -1].all()))
        valid = index >= 0

        planes = kwargs.get("deepstack_visual_embeds")
        if planes is not None:
            seen: Tensor = kwargs["visual_pos_masks"]
            plane_row = (seen.flatten().cumsum(0) - 1).view_as(seen)
            planes = [_merge(plane, plane_row, placed, selections) for plane in planes]
            kwargs["visual_pos_masks"] = still = take(seen, origin) & valid
            kwargs["deepstack_visual_embeds"] = [plane[take(plane_row, origin)[still]] for plane in planes]
        flat_row = torch.arange(embeds.shape[0] * length, device=embeds.device).view(-1, length)
        merged = _merge(embeds.flatten(0, 1), flat_row, placed, selections, self._projector).view_as(embeds)
        kwargs["inputs_embeds"] = take(merged, origin)

        kept_positions = take_positions(positions, origin)
        if self._positions == "renumber":
            kept_positions, shift = renumber(positions, current, kept_positions, valid)
            call.state.shift = shift if call.state.shift is None else call.state.shift + shift
        clock = StageClock()
        clock.add("encoder", *(span for encoded in pending.values() for span in encoded.spans))
        clock.add("selection", span.stop())
        call.state.floor = call.seen + int(
            (visual.any(dim=0) * torch.arange(1, length + 1, device=visual.device)).max()
        )
        stats, trace = self._account(pending, placed, selections, asked, keep & asked)
        call.removal = Removal(keep, index, stats, trace, clock)
        item = take(item, origin).masked_fill(~valid, -1)
        return kwargs, Prompt(valid, item, take(~visual, origin) & valid, call.tail), kept_positions

    def _select(self, placed: Sequence[Placed]) -> list[Selection]:
        items = [entry.item for entry in placed]
        if isinstance(self._method, VisualMethod):
            return self._method.compress(items, self.keep, self._needs)
        for item in items:
            require_finite(item, self._needs)
        if self._method is None:
            return [Selection.everything(len(item), item.embeddings.device) for item in items]
        # What tokens absorbed in the encoder is in their features already.
        return [
            Selection.everything(len(entry.item), entry.positions.device)
            if entry.reduced is None
            else Selection(entry.reduced.anchor.to(entry.positions.device))
            for entry in placed
        ]

    def _account(
        self,
        pending: Mapping[Modality, Encoded],
        placed: Sequence[Placed],
        selections: Sequence[Selection],
        asked: Tensor,
        keep: Tensor,
    ) -> tuple[Stats, list[Trace]]:
        in_rows = [
            (row, entry, selection) for entry, selection in zip(placed, selections, strict=True) for row in entry.rows
        ]
        in_rows.sort(key=lambda triple: triple[0])
        items = [
            ItemStats(
                row,
                entry.item.modality,
                len(entry.item),
                len(selection),
                entry.separators if self._newlines else 0,
            )
            for row, entry, selection in in_rows
        ]
        trace = [
            Trace(row, entry.item.modality, entry.item.grids, entry.reduced or selection, entry.positions)
            for row, entry, selection in in_rows
        ]
        encoded = pending.values()
        reused = 1 - sum(part.fresh for part in encoded) / sum(len(part.layouts) for part in encoded)
        tokens, kept = asked.sum(dim=1).tolist(), keep.sum(dim=1).tolist()
        return Stats(items, tokens, kept, llm_shape(self._decoder), reused=reused), trace

    def _before_layer(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # FlashAttention reads gaps in position ids as packed sequences; RoPE is already in position_embeddings.
        return None if self._forward.call.span is None else (args, {**kwargs, "position_ids": None})

    @eagerly
    def _after_decoder(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        call = self._forward.call
        if call.span is None:
            return None
        if call.cache is not None:
            call.cache.state = call.state
        run = None if self.llm_stage is None else self.llm_stage.end()
        if call.ahead is not None:
            return None
        restored = None if call.removal is None else self._restore(call, call.removal, run, output)
        if self.kv_stage is not None and call.cache is not None:
            self.kv_stage.finish()
        if call.cache is not None:
            self.kv_layers = call.cache.bytes
        call.span.stop()
        if call.removal is not None:
            self.clock.add("prefill", call.span)
        elif kwargs["inputs_embeds"].shape[1] == 1:
            self.clock.add("decode", call.span)
        return restored

    def _restore(self, call: Call, removal: Removal, run: Run | None, output: Any) -> Any:
        """The output of a prefill as if nothing had been removed; what was is noted."""
        keep, index = removal.keep, removal.index
        if call.cache is not None:
            call.cache.drop(keep.shape[1] - index.shape[1])
        self.stats, self.trace, self.clock = removal.stats, removal.trace, removal.clock
        hidden = output.last_hidden_state
        if run is not None:
            hidden = self._leave(run, hidden)
        output.last_hidden_state = spread(hidden, keep.to(hidden.device), index.to(hidden.device))
        return output

    def _leave(self, run: Run, hidden: Tensor) -> Tensor:
        """Account for what was removed inside the LLM, and spread `hidden` over all columns that entered it."""
        assert self.stats is not None
        left = {
            removed.layer: ((removed.index >= 0).sum(dim=1) - self._forward.call.tail).tolist()
            for removed in run.removed
        }
        self.stats = replace(self.stats, row_left=left)
        for removed in reversed(run.removed):
            keep, index = removed.keep.to(hidden.device), removed.index.to(hidden.device)
            hidden = spread(hidden, keep, index)
            if run.cache is not None:
                run.cache.drop(keep.shape[1] - index.shape[1], removed.layer)
        return hidden


def _columns(mask: Any, cache: PrunedStaticCache, seen: int, length: int) -> Any:
    """The 2-D mask `[batch, seen + length]` of which `generate` made `mask`, as it does ahead of a static cache.

    Raises:
        UnsupportedError: the cache is too small for the prompt, as `generate` sees it.
    """
    if cache.get_max_length() < seen + length:
        raise UnsupportedError(
            f"a static cache must have room for the uncompressed prompt of {seen + length} tokens, but "
            f"max_cache_len={cache.get_max_length()}."
        )
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return mask
    allowed = mask[:, 0, :, : seen + length]
    allowed = allowed if allowed.dtype == torch.bool else allowed == 0
    columns = allowed[:, -1]
    causal = columns.new_ones(length, seen + length).tril(seen)
    is_padding = ~columns[:, seen:, None]  # whatever it sees
    return columns if bool((is_padding | (allowed == columns[:, None] & causal)).all()) else mask


def llm_shape(decoder: Any) -> LLMShape:
    """The cost-relevant dimensions of a text model."""
    config = decoder.config
    heads = config.num_attention_heads
    return LLMShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        bytes_per_value=decoder.dtype.itemsize,
    )


def _merge(
    rows: Tensor,
    row_of: Tensor,
    placed: Sequence[Placed],
    selections: Sequence[Selection],
    projector: nn.Module | None = None,
) -> Tensor:
    """Write what merged tokens absorb into `rows` `[all, dim]`; `row_of` `[batch, length]` finds a token's row.

    With a `projector`, tokens absorb features and are made of them anew.
    """
    if all(selection.weight is None for selection in selections):
        return rows
    merged = rows.clone()
    for entry, selection in zip(placed, selections, strict=True):
        if selection.weight is None:
            continue
        members = [row_of[row, entry.positions] for row in entry.rows]
        if projector is None:
            outputs = [selection.apply(rows[tokens]) for tokens in members]
        else:
            outputs = [projector(selection.apply(cast(Tensor, entry.features))).to(rows)] * len(members)
        for tokens, output in zip(members, outputs, strict=True):
            merged[tokens[selection.anchor]] = output
    return merged
