"""The workers' side: an attention backend for CPUs that reads what a KV policy has left or chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from mmcompress.integrations.vllm.kv.engine import plan_of
from mmcompress.integrations.vllm.kv.page_reader import PageReader
from mmcompress.integrations.vllm.kv.paged import Chunk, Paged, Steps, slots_of
from mmcompress.integrations.vllm.kv.plan import Window
from mmcompress.integrations.vllm.kv.spec import KVSpec
from mmcompress.llm_method import LLMFacts
from mmcompress.policies.quest import Quest

_AT_ONCE = 1 << 17
"""Entries that are gathered at once. Only a request that was put off has more to read, token by token."""


@dataclass(frozen=True)
class KVMetadata:
    """What is read in a pass.

    Args:
        slots: `[tokens]`, where the entries of the pass go.
        chunks: the parts of prompts in it.
        steps: the tokens behind prompts.
        read: what each of `steps` reads, where that is the same in all layers.
    """

    slots: Tensor
    chunks: list[Chunk]
    steps: list[Steps]
    read: list[tuple[Tensor, Tensor]] | None


class KVBackend(CPUAttentionBackend):
    """Attention under a KV policy."""

    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]
    window: ClassVar[Window | None] = None
    """What the layers that were built last leave; vLLM says no more where it asks for their specification."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The attention of a layer."""
        return KVAttention

    @staticmethod
    def get_builder_cls() -> Any:
        """What prepares a pass for all layers."""
        return KVMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The specification that tells the scheduler what is freed."""
        assert type(spec) is FullAttentionSpec
        return KVSpec.of(spec, cls.window)


class KVMetadataBuilder(AttentionMetadataBuilder[KVMetadata]):
    """Tells prompts from what comes behind them."""

    kv_cache_spec: KVSpec

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # which vLLM declares abstract
        super().__init__(*args, **kwargs)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> KVMetadata:
        """What is read in a pass."""
        common = common_attn_metadata
        assert common.rswa_prefix_lens is not None
        begins, lengths = common.query_start_loc_cpu.tolist(), common.seq_lens.tolist()
        table, block = common.block_table_tensor.long(), self.kv_cache_spec.block_size
        chunks: list[Chunk] = []
        steps: list[_Token] = []
        for row, prompt in enumerate(common.rswa_prefix_lens.tolist()):
            begin, end = begins[row], begins[row + 1]
            first = lengths[row] - (end - begin)
            split = begin + min(max(prompt - first, 0), end - begin)
            if split > begin:
                slots = slots_of(table[row], torch.arange(first + split - begin), block)
                chunks.append(Chunk(slice(begin, split), slots))
            steps += [_Token(number, row, first + number - begin, prompt) for number in range(split, end)]
        parts = [_steps(part, table, block) for part in _parts(steps)]
        window = self.kv_cache_spec.window
        read = None if window is None else [part.within(window) for part in parts]
        return KVMetadata(common.slot_mapping, chunks, parts, read)


class _Token(NamedTuple):
    """A token behind its prompt: its number in the batch, the row and the place in its request, the prompt's length."""

    number: int
    row: int
    position: int
    prompt: int


def _parts(steps: list[_Token]) -> list[list[_Token]]:
    """Not too many at once."""
    longest = max((token.position for token in steps), default=0) + 1
    count = max(1, _AT_ONCE // longest)
    return [steps[begin : begin + count] for begin in range(0, len(steps), count)]


def _steps(steps: list[_Token], table: Tensor, block: int) -> Steps:
    numbers, rows, positions, prompts = torch.tensor(steps).T
    return Steps(numbers, table[rows, : int(positions.max()) // block + 1], positions, prompts, block)


class KVAttention(CPUAttentionBackendImpl):
    """Attention of one layer under a KV policy."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vllm_config = get_current_vllm_config()
        plan = plan_of(vllm_config)
        assert plan is not None
        self._plan = plan
        self._reader: PageReader | None = None
        self._layers = vllm_config.model_config.hf_text_config.num_hidden_layers
        KVBackend.window = plan.window

    def do_kv_cache_update(
        self, layer: nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Store the entries of a pass, and note what is to be known of their keys."""
        stored = slot_mapping >= 0
        key, value, slots = key[: len(stored)][stored], value[: len(stored)][stored], slot_mapping[stored]
        Paged(kv_cache).store(key, value, slots)
        reader = self._page_reader(layer, kv_cache)
        if reader is not None:
            reader.take_in(key, slots)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of a pass `[tokens, heads, dim]`, written to `output`."""
        if attn_metadata is None:  # warming up
            return output
        paged, reader = Paged(kv_cache), self._page_reader(layer, kv_cache)
        for chunk in attn_metadata.chunks:
            output[chunk.tokens] = chunk.attend(query[chunk.tokens], paged, self.scale)
        for number, steps in enumerate(attn_metadata.steps):
            asking = query[steps.tokens]
            if attn_metadata.read is not None:
                read = attn_metadata.read[number]
            else:
                read = steps.everything() if reader is None else reader.choose(asking, steps)
            output[steps.tokens] = steps.attend(asking, paged, read, self.scale)
        return output

    def _page_reader(self, layer: Any, cache: Tensor) -> PageReader | None:
        """What chooses in this layer; None if nothing is chosen."""
        policy = self._plan.policy
        if self._reader is None and isinstance(policy, Quest):
            duties = policy.duties(LLMFacts(self._layers, self.num_heads))
            if not duties[extract_layer_index(layer.layer_name)].reads_all:
                self._reader = PageReader(policy, self._plan.keep, cache)
        return self._reader
