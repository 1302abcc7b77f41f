"""The sparse-reading stage: in steps of one token, attention reads what a policy chose of a layer's cache.

Nothing is evicted, and passes of several tokens read everything. What a policy knows of the keys is kept with the
cache, and covers all of them from the first step on.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.budget import Budget
from mmcompress.errors import UnsupportedError
from mmcompress.integrations.hf.attached import Attached
from mmcompress.integrations.hf.families import Family
from mmcompress.integrations.hf.kv_stage import KVRun
from mmcompress.integrations.hf.llm_stage import eagerly, llm_facts
from mmcompress.integrations.hf.taps import tap
from mmcompress.sparse_reader import Entries, Reading, SparseReader, Step


def require_sparse(family: Family, policy: SparseReader) -> None:
    """Check, before anything is changed, that `policy` can act on a model.

    Raises:
        UnsupportedError: the model's attention cannot be replaced.
        SpecError: the policy's layers do not fit the model.
    """
    policy.duties(llm_facts(family))
    attention = family.base.get_decoder().config._attn_implementation
    if attention not in ("sdpa", "eager") and "flash" not in attention:
        raise UnsupportedError(
            f"KV policy {policy.info.name} replaces what attention reads, which is not built for {attention}; load the "
            "model with attn_implementation='sdpa'."
        )


@dataclass
class _Pass:
    """One step on its way through the layers.

    Args:
        run: the pass of the text model.
        entries: by the first layer that holds them, and device, where they are.
        first: the first layer that holds what the last layer holds.
        reading: what was chosen last; None if nothing was of what that layer holds.
    """

    run: KVRun
    entries: dict[tuple[int, torch.device], Entries] = field(default_factory=dict)
    first: int = 0
    reading: Reading | None = None


class _Local(threading.local):
    """What one thread is computing."""

    def __init__(self) -> None:
        self.step: _Pass | None = None


class SparseStage(Attached):
    """The taps of one sparse-reading policy on one model.

    Args:
        family: the model.
        policy: what is read.
        keep: how many entries, of those that each row holds, per KV head.
    """

    def __init__(self, family: Family, policy: SparseReader, keep: Budget) -> None:
        self.policy, self.keep = policy, keep
        self._read: dict[int, Tensor] = {}
        self._duties = policy.duties(llm_facts(family))
        self._local = _Local()
        decoder: Any = family.base.get_decoder()
        self._tapped: list[tuple[nn.Module, Any]] = [
            (block.self_attn, tap(block.self_attn, attend=partial(self._attend, layer)))
            for layer, block in enumerate(decoder.layers)
        ]

    def remove(self) -> None:
        """Give every module its own config back."""
        for attention, original in self._tapped:
            attention.config = original

    def begin(self, run: KVRun) -> None:
        """Follow a pass, if it is a step.

        Raises:
            UnsupportedError: a policy that evicts was at work on this cache.
        """
        if run.state.held:
            raise UnsupportedError(
                f"a KV policy took entries out of this cache, which {self.policy.info.name} does not follow; go on "
                "with the policy it began with, or start a new cache."
            )
        self._read = {}
        self._local.step = _Pass(run) if run.current.shape[1] == 1 else None

    @property
    def read(self) -> list[int] | None:
        """See `Stats.kv_read`."""
        return [int(self._read[layer].sum()) for layer in sorted(self._read)] or None

    def finish(self) -> None:
        """Nothing waits for the last layer."""

    def end(self) -> None:
        """Follow nothing any more."""
        self._local.step = None

    @eagerly
    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        step = self._local.step
        if step is None:
            return None
        entries = self._entries(step, layer, key.device)
        columns = entries.valid.shape[1]  # a static cache has room for more
        reading = self._reading(step, layer, query[:, :, 0], key[:, :, :columns], entries)
        if reading is None:
            self._read[layer] = entries.valid[:, None].expand(-1, key.shape[1], -1)
            return None
        self._read[layer] = reading.valid
        return reading.attend(query[:, :, 0], key, value, kwargs["scaling"])[:, None]

    @torch.no_grad()
    def _reading(self, step: _Pass, layer: int, query: Tensor, key: Tensor, entries: Entries) -> Reading | None:
        """What `layer` reads; None if it reads everything."""
        duty, reads = self._duties[layer], step.run.state.reads
        keep = [self.keep.tokens(held) for held in entries.held]
        if keep == entries.held:
            return None
        if duty.chooses or (step.reading is None and not duty.reads_all):
            summary = self.policy.summarise(reads.get(layer), key, entries)
            if summary is not None:
                reads[layer] = summary
            step.reading = self.policy.choose(Step(query, key, entries, keep, summary))
        return None if duty.reads_all or step.reading is None else step.reading.to(key.device)

    def _entries(self, step: _Pass, layer: int, device: torch.device) -> Entries:
        """Where entries are in `layer`; where tokens were removed before it, nothing is chosen yet."""
        state = step.run.state
        first = max((start for start in state.stretches if start <= layer), default=0)
        if first != step.first:
            step.first, step.reading = first, None
        if (first, device) not in step.entries:
            mask = state.stretches[first].mask if first in state.stretches else state.mask
            assert mask is not None
            step.entries[first, device] = Entries(mask.to(device))
        return step.entries[first, device]
