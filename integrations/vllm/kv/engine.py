"""An engine's configuration under a KV policy: what stands against it, and how vLLM comes to apply it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from mmcompress.integrations.vllm.kv.plan import KVPlan
from mmcompress.integrations.vllm.settings import Settings
from mmcompress.policies.quest import Quest

UNMEASURED = ("int8", "int4", "nvfp4", "turboquant", "ultraquant", "fp8_per_token_head")
"""What the names of vLLM's own caches begin with that were never measured beside visual compression."""


def plan_of(vllm_config: Any) -> KVPlan | None:
    """The KV policy of an engine; None if it has none."""
    wanted = vllm_config.additional_config
    if not isinstance(wanted, dict) or "mmcompress" not in wanted:
        return None
    return KVPlan.of(Settings.parse(wanted["mmcompress"]).config)


def apply(vllm_config: Any) -> None:
    """Have every process of the engine apply the KV policy."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    vllm_config.attention_config.backend = AttentionBackendEnum.CUSTOM
    # vLLM tells backends how long prompts are where a model has reference sliding windows; their size is never read.
    vllm_config.model_config.model_arch_config.rswa_window = 0
    _limit_prompts()


def obstacles(vllm_config: Any, plan: KVPlan) -> Iterator[str]:
    """What in the engine's configuration stands against a KV policy, and what to do about it."""
    from vllm.platforms import current_platform

    attention, dtype = vllm_config.attention_config, vllm_config.cache_config.cache_dtype
    if not current_platform.is_cpu():
        yield "KV policies are built for vLLM on CPUs; take --kv-cache-dtype fp8, or use transformers"
    if dtype != "auto":
        yield f"KV policies read what vLLM packs no further; leave out kv, or --kv-cache-dtype {dtype}"
    if attention.backend is not None or attention.backend_per_kind:
        yield "KV policies bring an attention backend of their own; leave out --attention-backend"
    if vllm_config.kv_transfer_config is not None or vllm_config.cache_config.kv_offloading_size is not None:
        yield "caches under KV policies are not handed on; leave out --kv-transfer-config and --kv-offloading-size"
    if vllm_config.speculative_config is not None:
        yield "drafts would be checked against what was evicted; leave out --speculative-config"
    heads, ranks = vllm_config.model_config.get_total_num_kv_heads(), vllm_config.parallel_config.tensor_parallel_size
    if isinstance(plan.policy, Quest) and heads % ranks:
        yield (
            f"quest chooses by all queries of a KV head, which {ranks} ranks do not have of {heads}; lower "
            "--tensor-parallel-size"
        )
    if vllm_config.model_config.get_sliding_window() is not None:
        yield "this model has sliding windows of its own, which KV policies do not follow; use transformers"


def unmeasured(vllm_config: Any) -> str | None:
    """What is to be said of the engine's own kind of cache, if that goes along but was never measured."""
    dtype = str(vllm_config.cache_config.cache_dtype)
    if not dtype.startswith(UNMEASURED):
        return None
    return f"--kv-cache-dtype {dtype} is vLLM's own; beside visual compression it was never measured."


def _limit_prompts() -> None:
    """Have the front end refuse prompts that the pool cannot hold, which the scheduler would put off forever."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    from mmcompress.integrations.vllm.kv.spec import longest_prompt

    stock = InputProcessor._validate_prompt_len
    if hasattr(stock, "mmcompress"):
        return

    @functools.wraps(stock)
    def validate(self: Any, prompt_len: int, prompt_type: str) -> None:
        stock(self, prompt_len, prompt_type)
        plan = plan_of(self.vllm_config)
        if plan is None or plan.window is None:
            return
        most = longest_prompt(self.vllm_config, plan.window)
        if prompt_len > most:
            raise VLLMValidationError(
                f"mmcompress: the prompt has {prompt_len} tokens, but the KV cache can take {most}, as it is read in "
                "full before anything is evicted; raise --kv-cache-memory-bytes."
            )

    validate.mmcompress = True  # type: ignore[attr-defined]
    InputProcessor._validate_prompt_len = validate
