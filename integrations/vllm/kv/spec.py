"""The scheduler's side: blocks are freed that no coming token reads, and prompts alone are shared.

Importing this makes the specification known to vLLM, in every process to which one is sent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from mmcompress.integrations.vllm.kv.plan import Window


@dataclass(frozen=True, kw_only=True)
class KVSpec(FullAttentionSpec):
    """A layer's cache under a KV policy.

    Args:
        window: what is left of a request; None if nothing is evicted.
    """

    window: Window | None = None

    @classmethod
    def of(cls, spec: FullAttentionSpec, window: Window | None) -> KVSpec:
        """The cache `spec` describes, with `window`."""
        return replace_as(spec, cls, window=window)

    @classmethod
    def merge(cls, specs: list[KVSpec]) -> KVSpec:  # type: ignore[override]
        """One specification for all layers, which must agree."""
        (window,) = {spec.window for spec in specs}
        return replace(super().merge(specs), window=window)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """What must fit for any request to be served to its end."""
        if self.window is None:
            return super().max_memory_usage_bytes(vllm_config)
        needed = self.window.most + in_flight(vllm_config)
        return cdiv(min(needed, vllm_config.model_config.max_model_len), self.block_size) * self.page_size_bytes


def in_flight(vllm_config: VllmConfig) -> int:
    """Tokens that a request may hold beyond those that count: of unfinished passes, and rests of blocks."""
    return vllm_config.max_in_flight_tokens + 2 * vllm_config.cache_config.block_size


def longest_prompt(vllm_config: VllmConfig, window: Window) -> int:
    """How long prompts may be, which are read in full before anything is evicted, where the pool has few blocks."""
    cache, length = vllm_config.cache_config, vllm_config.model_config.max_model_len
    usable = cache.num_gpu_blocks // vllm_config.parallel_config.data_parallel_size - 1
    room = usable * cache.block_size
    return length if room >= length else room - in_flight(vllm_config) - window.policy.every


class KVManager(FullAttentionManager):
    """Frees what the window of a request has left behind."""

    kv_cache_spec: KVSpec

    def __init__(self, kv_cache_spec: KVSpec, **kwargs: Any) -> None:
        # A request that was put off has grown since, maybe beyond the pool, of which it never needs more than all.
        kwargs["max_admission_blocks_per_request"] = kwargs["block_pool"].num_gpu_blocks - 1
        super().__init__(kv_cache_spec, **kwargs)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks between the sinks and what the next token still sees."""
        window = self.kv_cache_spec.window
        if window is None or num_prompt_tokens is None:
            return
        start = window.start(num_prompt_tokens, processed_computed_tokens)
        self._remove_blocks_in_range(request_id, cdiv(window.sinks, self.block_size), start // self.block_size)

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Offer the prompt's blocks to other requests; what came behind it was computed of a part of what was there."""
        super().cache_blocks(request, min(num_tokens, request.num_prompt_tokens), *args, **kwargs)


def _register() -> None:
    KVCacheSpecRegistry._ensure_registered()  # vLLM registers its own only as long as there are none
    KVCacheSpecRegistry.register(KVSpec, KVManager, uniform_type_base_spec=FullAttentionSpec)


_register()
