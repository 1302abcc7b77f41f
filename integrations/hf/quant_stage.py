"""The quantising stage: hooks on decoder layers that pack what is due of a layer's cache once its attention has run.

A prompt attends to keys and values in full; what comes later to what is read of those that were packed, single tokens
to their codes where `ops` reads these. An evicting policy may act before, on the first prompt: what is packed stays
together.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from mmcompress.errors import SpecError, UnsupportedError
from mmcompress.integrations.hf.attached import Attached
from mmcompress.integrations.hf.cache import Held, PrunedDynamicLayer
from mmcompress.integrations.hf.families import Family
from mmcompress.integrations.hf.generation import cache_asked
from mmcompress.integrations.hf.kv_stage import KVRun, KVStage
from mmcompress.integrations.hf.llm_stage import eagerly
from mmcompress.integrations.hf.packed_attention import attend, reads_codes
from mmcompress.integrations.hf.quantised import Arrival, QuantisedLayer, quantise
from mmcompress.integrations.hf.taps import tap
from mmcompress.kv_policy import Evictor, KVPolicy, KVRow, Quantiser

_SHIFTING = ("dynamic", "longrope")


def require_quantised(family: Family, model: Any, quantiser: Quantiser, evictor: Evictor | None) -> None:
    """Check, before anything is changed, that `quantiser` can act on a model, behind `evictor` if there is one.

    Raises:
        SpecError: heads cannot be packed, or the policies do not go together.
        UnsupportedError: the model's positions or cache do not take what the policy needs.
    """
    name, config = quantiser.info.name, family.base.get_decoder().config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    quantiser.require(config.num_hidden_layers, heads, dim)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if not quantiser.rotated and rope in _SHIFTING:
        raise UnsupportedError(
            f"KV policy {name} rotates keys when they are read, but the model's rotation (rope_type={rope!r}) changes "
            "with the length; choose a policy that packs keys as rotated."
        )
    if (asked := cache_asked(model)) != "dynamic":
        raise UnsupportedError(
            f"KV policy {name} holds entries in few bits, but the model's generation_config asks for "
            f"cache_implementation={asked!r}; set that to None."
        )
    if evictor is None:
        return
    if evictor.schedule == "step":
        raise SpecError(
            f"{evictor.info.name} takes entries out at every step, and what {name} has packed cannot be taken out; "
            "give a policy that evicts behind the prompt only, such as snapkv."
        )
    if type(evictor).head_budgets is not Evictor.head_budgets:
        raise SpecError(
            f"{evictor.info.name} leaves every head another number of entries, which {name} cannot pack together; give "
            "a policy with one budget for all heads, such as snapkv."
        )


@dataclass
class _Pass:
    """One pass on its way through the layers.

    Args:
        run: the pass of the text model.
        saliency: of each row, what the policy said of entries of the layer that is running, if it was asked.
        waiting: by layer that is to be packed behind the last one, what arrived there.
        whole: by columns of a pass, which rows of them have no padding.
    """

    run: KVRun
    saliency: list[Tensor | None] = field(default_factory=list)
    waiting: dict[int, Arrival] = field(default_factory=dict)
    whole: dict[Tensor, list[bool]] = field(default_factory=dict)

    def whole_rows(self) -> list[bool]:
        """Which rows of the columns at this depth have no padding."""
        valid = self.run.columns()[0]  # held by the key, so that its identity is nobody else's
        if valid not in self.whole:
            self.whole[valid] = valid.all(dim=1).tolist()
        return self.whole[valid]


class _Local(threading.local):
    """What one thread is computing."""

    def __init__(self) -> None:
        self.pass_: _Pass | None = None


class QuantStage(Attached):
    """The hooks of one quantising policy on one model.

    Args:
        family: the model.
        quantiser: what packs.
        evictor: the hooks of a policy that takes entries out first.
    """

    def __init__(self, family: Family, quantiser: Quantiser, evictor: KVStage | None = None) -> None:
        self.quantiser, self._evictor = quantiser, evictor
        self._decoder: Any = family.base.get_decoder()
        self._local = _Local()
        needs, layers = quantiser.needs(), self._decoder.layers
        self._collects = bool(needs.queries or needs.steps)
        self._hooks: list[Any] = [
            block.self_attn.register_forward_hook(partial(self._after_attention, layer))
            for layer, block in enumerate(layers)
        ]
        self._tapped: list[tuple[nn.Module, Any]] = []
        if self._collects or quantiser.code_bits is not None:
            self._tapped = [
                (block.self_attn, tap(block.self_attn, partial(self._collect, layer), partial(self._attend, layer)))
                for layer, block in enumerate(layers)
            ]

    @property
    def policy(self) -> KVPolicy:
        """The policy that acts first."""
        return self.quantiser if self._evictor is None else self._evictor.policy

    def remove(self) -> None:
        """Take every hook off, and give every module its own config back."""
        self.end()
        for hook in self._hooks:
            hook.remove()
        for attention, original in self._tapped:
            attention.config = original
        if self._evictor is not None:
            self._evictor.remove()

    def begin(self, run: KVRun) -> None:
        """Follow a pass.

        Raises:
            UnsupportedError: this cache does not take what is packed, or holds what this policy did not pack.
        """
        if run.ahead is not None:  # what is read in vain is not packed
            self._local.pass_ = None
        else:
            self._adopt(run)
            self._local.pass_ = _Pass(run)
            for layer in _layers(run):
                layer.reads_codes = run.current.shape[1] == 1 and reads_codes(layer.rows, self.quantiser)
        if self._evictor is not None:
            self._evictor.begin(run)

    def finish(self) -> None:
        """Pack what waited for the last layer, and note what belongs together now."""
        following = self._local.pass_
        if self._evictor is not None:
            self._evictor.finish()
        if following is None:
            return
        run = following.run
        for layer, arrival in following.waiting.items():
            self._settle(run, _layers(run)[layer], arrival)
        loose = [row.loose for layer in _layers(run) for row in layer.rows]
        packed = [count for count in loose if count is not None]
        if packed:
            run.state.floor = max(run.state.floor, run.seen - min(packed))

    def end(self) -> None:
        """Follow nothing any more."""
        if self._local.pass_ is not None:
            for layer in _layers(self._local.pass_.run):
                layer.reads_codes = False
        self._local.pass_ = None
        if self._evictor is not None:
            self._evictor.end()

    def _adopt(self, run: KVRun) -> None:
        name, cache = self.quantiser.info.name, run.cache
        if not isinstance(cache, DynamicCache) or cache.offloading:
            raise UnsupportedError(
                f"KV policy {name} holds entries in few bits, which static and offloaded caches do not take; leave out "
                "cache_implementation."
            )
        if run.state.quantiser is None and cache.stored():
            raise UnsupportedError(f"this cache was filled without {name}; start a new cache.")
        if run.state.quantiser not in (None, self.quantiser):
            raise UnsupportedError(
                f"this cache holds what {run.state.quantiser} packed, not {self.quantiser}; go on with the policy it "
                "began with, or start a new cache."
            )
        if self._evictor is not None and run.brings_prompt and cache.stored():
            raise UnsupportedError(
                f"{self._evictor.policy.info.name} takes entries out behind every prompt, and what {name} has packed "
                "cannot be taken out: a second prompt needs a new cache."
            )
        for number in range(len(self._decoder.layers)):
            if number == len(cache.layers):
                cache.layers.append(PrunedDynamicLayer())
            layer: Any = cache.layers[number]
            if not isinstance(layer, QuantisedLayer):
                quantise(layer, number, self.quantiser, self._decoder.rotary_emb)
        run.state.quantiser = self.quantiser

    @torch.no_grad()
    def _collect(self, layer: int, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> None:
        following = self._local.pass_
        if not self._collects or following is None:
            return
        if _layers(following.run)[layer].reading is None:  # nothing is stored where one probes
            return
        run, stored = following.run, _layers(following.run)[layer]
        following.saliency = []
        for number, valid in enumerate(run.columns()[0].to(query.device)):
            waiting = stored.waiting(number, valid)
            due = max(
                self.quantiser.keys_due(waiting, run.brings_prompt),
                self.quantiser.values_due(waiting, run.brings_prompt),
            )
            asked = query[number][:, valid].detach()
            row = self._view(run, stored, number, valid, asked, kwargs["scaling"]) if due else None
            following.saliency.append(None if row is None else self.quantiser.saliency(row))

    @eagerly
    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        following = self._local.pass_
        stored = None if following is None else _layers(following.run)[layer]
        if stored is None or not stored.reads_codes:
            return None
        return attend(stored.rows, self.quantiser, query, key, value, kwargs["scaling"]).transpose(1, 2)

    def _view(
        self, run: KVRun, stored: QuantisedLayer, number: int, valid: Tensor, query: Tensor, scaling: float
    ) -> KVRow:
        key, value = stored.unpacked(number, valid)
        before = stored.rows[number].keys.tokens if stored.rows else 0
        if stored.rows and self._evictor is not None:
            before = int(run.state.held[stored.number].seen[number])
        seen = before + query.shape[1]
        place = torch.arange(seen - key.shape[1], seen, device=key.device).expand(len(key), -1)
        visual = torch.zeros_like(place, dtype=torch.bool)
        visual[:, key.shape[1] - query.shape[1] :] = run.columns()[1][number].to(valid.device)[valid]
        return KVRow(
            layer=stored.number,
            layers=len(self._decoder.layers),
            key=key,
            value=value,
            place=place,
            visual=visual,
            seen=seen,
            generated=0 if run.brings_prompt else stored.generated + len(valid),
            scaling=scaling,
            query=query,
        )

    @torch.no_grad()
    def _after_attention(self, layer: int, module: Any, args: Any, output: Any) -> None:
        following = self._local.pass_
        if following is None:
            return
        run, stored = following.run, _layers(following.run)[layer]
        valid = run.columns()[0]
        saliency = following.saliency or [None] * len(valid)
        arrival = Arrival(valid, following.whole_rows(), run.brings_prompt, self._ids(run, stored), saliency)
        needs = None if self._evictor is None else self._evictor.policy.needs()
        if needs is not None and (needs.masses or needs.lookahead) and not stored.rows:
            following.waiting[layer] = arrival
        else:
            self._settle(run, stored, arrival)

    def _settle(self, run: KVRun, stored: QuantisedLayer, arrival: Arrival) -> None:
        if self._evictor is not None and not stored.rows:
            arrival = _left(arrival, run.state.held[stored.number])
        stored.settle(arrival)

    def _ids(self, run: KVRun, stored: QuantisedLayer) -> list[Tensor] | None:
        """Positions `[..., 1, tokens]` of each row's new tokens, as the layer rotates them; None if unneeded."""
        if self.quantiser.rotated:
            return None
        inside = {} if run.inside is None else run.inside.replaced.get(stored.number, {})
        ids = inside.get("position_ids", run.ids)
        ids = ids[-3:] if ids.dim() == 3 else ids
        ids = ids.to(stored.device, torch.int32)
        new = run.columns()[0].to(stored.device)
        return [ids[..., number, valid][..., None, :] for number, valid in enumerate(new)]


def _layers(run: KVRun) -> Sequence[QuantisedLayer]:
    return cast(Sequence[QuantisedLayer], run.cache.layers)


def _left(arrival: Arrival, held: Held) -> Arrival:
    """What is left of a first prompt where a policy has taken entries out."""
    places = [place[here].view(len(place), -1) for place, here in zip(held.place, held.valid, strict=True)]
    ids, saliency = arrival.ids, arrival.saliency
    return Arrival(
        valid=held.valid[:, 0],
        whole=held.filled.whole,
        prompt=arrival.prompt,
        ids=ids and [of_row[..., 0, :][..., place] for of_row, place in zip(ids, places, strict=True)],
        saliency=[
            None if of_row is None else of_row.gather(1, place) for of_row, place in zip(saliency, places, strict=True)
        ],
    )
