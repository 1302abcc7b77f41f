"""The pruning door: hooks on the text model through which every prompt enters compressed.

The model's own merging of features into embeddings stays untouched. At the text model's entrance the visual tokens
are compressed for real (embeddings, positions, masks, DeepStack planes), at its exit hidden states are spread back
to the prompt's length, and the cache remembers how many tokens it never saw.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from mmcompress.accounting import Stats
from mmcompress.budget import Budget
from mmcompress.compact import spread
from mmcompress.encoder_method import EncoderMethod
from mmcompress.errors import UnsupportedError
from mmcompress.integrations.hf.attached import Attached
from mmcompress.integrations.hf.cache import PrunedCache, PrunedStaticCache, adopt, layer_mask, padding_mask
from mmcompress.integrations.hf.call import Call, Removal
from mmcompress.integrations.hf.clock import Span, StageClock
from mmcompress.integrations.hf.continuation import real_columns, require_same_stages
from mmcompress.integrations.hf.draft import Draft
from mmcompress.integrations.hf.encoder_stage import EncoderStage
from mmcompress.integrations.hf.families import Family
from mmcompress.integrations.hf.generation import FEATURE_INPUTS, Generation
from mmcompress.integrations.hf.kv_stage import KVRun, KVStage
from mmcompress.integrations.hf.listener import Listener
from mmcompress.integrations.hf.llm_run import Run
from mmcompress.integrations.hf.llm_stage import LLMStage, eagerly
from mmcompress.integrations.hf.projector_stage import ProjectorStage
from mmcompress.integrations.hf.quant_stage import QuantStage
from mmcompress.integrations.hf.removal import Remover
from mmcompress.integrations.hf.renamed import CACHE
from mmcompress.integrations.hf.sparse_stage import SparseStage
from mmcompress.integrations.hf.text_tower import TextTower
from mmcompress.integrations.hf.vision import Vision
from mmcompress.kv_policy import Ahead
from mmcompress.method import VisualMethod
from mmcompress.projector_method import ProjectorMethod
from mmcompress.types import EncoderFacts, Modality, Needs, Positions, Trace


class _Forward(threading.local):
    """What one thread's forward pass carries from hook to hook."""

    def __init__(self) -> None:
        self.ids: Tensor | None = None
        self.visual: dict[Modality, Tensor] = {}
        self.call = Call()


class Door(Attached):
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
        text_tower: TextTower | None = None,
    ) -> None:
        self._family = family
        self._method = method
        self.llm_stage = llm_stage
        self.kv_stage = kv_stage
        self._stage: EncoderStage | ProjectorStage | None = None
        projector = None
        if isinstance(method, EncoderMethod):
            self._stage = EncoderStage(family, method, needs, encoder, keep)
        elif isinstance(method, ProjectorMethod):
            self._stage = ProjectorStage(family, method, keep)
        elif method is not None and method.space == "pre_projector":
            projector = family.projector
        self._decoder: Any = family.base.get_decoder()
        self._parameters = list(inspect.signature(type(family.base).forward).parameters)[1:]
        self._forward = _Forward()
        self._keep = keep
        self.clock = StageClock()
        self.stats: Stats | None = None
        self.trace: list[Trace] = []
        self.kv_layers: list[tuple[int, int]] | None = None
        read = Needs(embeddings=True) if isinstance(method, EncoderMethod) else needs
        self.remover = Remover(family, method, read, positions, projector, text_tower)
        self.vision = Vision(family, read, projector, self._stage, keeps_inputs=draft is not None)
        lookahead = 0 if kv_stage is None else kv_stage.policy.needs().lookahead
        self.listener = None if draft is None else Listener(draft, self.vision, read.draft is not None, lookahead)
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
        kwargs = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        outputs = kwargs.get("mm_encoder_outputs") or {}
        self._forward.ids = ids = kwargs.get("input_ids")
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
        visual, cache = self._forward.visual, kwargs.get(CACHE)
        ahead = self._forward.call.ahead
        self._forward.call = Call()
        if not visual and not isinstance(cache, PrunedCache) and self.kv_stage is None and self.listener is None:
            return None
        if cache is None and (module.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]):
            cache = DynamicCache(config=module.config)
        call = Call(Span(kwargs["inputs_embeds"].device), visual, self._forward.ids, ahead=ahead)
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
        require_same_stages(state, self.llm_stage, self.kv_stage)
        _refuse_packed(kwargs)
        call.seen = 0 if call.cache is None else int(call.cache.get_seq_length())
        call.tail = self._generation.said(call.seen + length)
        current, past = real_columns(kwargs.get("attention_mask"), call, embeds)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(call.seen, call.seen + length, device=embeds.device)[None]
        positions = positions.to(embeds.device).expand(*positions.shape[:-2], batch, length)
        if self.listener is not None and call.ahead is None:
            self.listener.tell(call, current, positions)
        if state.shift is not None:
            positions = positions - state.shift[:, None]
        kwargs = {**kwargs, CACHE: call.cache}

        valid, prompt = current, None
        if call.visual:
            kwargs, prompt, positions = self.remover.remove(
                kwargs, call, current, positions, self.vision.pending, self.keep, self._newlines
            )
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
            if self.listener is not None and self.listener.lookahead:
                kv_run.look_ahead, kv_run.ahead = partial(self._look_ahead, self.listener, call), call.ahead
            self.kv_stage.begin(kv_run)
        return kwargs

    @torch.no_grad()
    def _look_ahead(self, listener: Listener, call: Call) -> dict[int, list[Ahead]]:
        """Read what the draft expects behind a prompt, for what is asked there, and forget it again."""
        told = listener.expect(call)
        ahead: dict[int, list[Ahead]] = {}
        visual, self._forward.visual, self._forward.call = self._forward.visual, {}, Call(ahead=ahead)
        try:
            self._decoder(
                inputs_embeds=self._family.base.get_input_embeddings()(told.ids),
                attention_mask=told.valid.long(),
                position_ids=told.positions,
                use_cache=True,
                **{CACHE: call.cache},
            )
        finally:
            self._forward.visual, self._forward.call = visual, call
        assert call.cache is not None
        call.cache.crop(-told.ids.shape[1])
        call.cache.state = call.state
        return ahead

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
            self.stats = replace(removal.stats, row_left=run.left())
            hidden = run.restore(hidden)
        output.last_hidden_state = spread(hidden, keep.to(hidden.device), index.to(hidden.device))
        return output


def _refuse_packed(kwargs: dict[str, Any]) -> None:
    """Refuse sequences that share a row; transformers tells them by position ids that begin anew, without a mask."""
    positions, packed = kwargs.get("position_ids"), kwargs.get("cu_seq_lens_q") is not None
    if positions is not None and kwargs.get("attention_mask") is None:
        text = positions[0] if positions.dim() == 3 and positions.shape[0] == 4 else positions
        packed = packed or (text.dim() == 2 and bool((text.diff(dim=-1) != 1).any()))
    if packed:
        raise UnsupportedError(
            "several sequences packed into one row cannot be compressed; give each a row of its own, with padding and "
            "an attention_mask."
        )
