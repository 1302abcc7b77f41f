"""How a pass goes on behind what its cache holds: who may, and which columns are real."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmcompress.errors import UnsupportedError
from mmcompress.integrations.hf.cache import CacheState, PrunedStaticCache
from mmcompress.integrations.hf.call import Call
from mmcompress.integrations.hf.kv_stage import KVStage
from mmcompress.integrations.hf.llm_stage import LLMStage
from mmcompress.integrations.hf.quant_stage import QuantStage
from mmcompress.integrations.hf.sparse_stage import SparseStage


def require_same_stages(
    state: CacheState, llm_stage: LLMStage | None, kv_stage: KVStage | SparseStage | QuantStage | None
) -> None:
    """Refuse to go on with a cache that other stages have changed than those at work.

    Raises:
        UnsupportedError: a KV policy or a method inside the LLM changed it, and is not at work now.
    """
    if state.held and kv_stage is None:
        raise UnsupportedError("a KV policy took entries out of this cache; go on with a policy, or start a new cache.")
    if state.quantiser is not None and not isinstance(kv_stage, QuantStage):
        raise UnsupportedError(
            f"this cache holds what {state.quantiser.info.name} packed; go on with that policy, or start a new cache."
        )
    layers = [] if llm_stage is None else [*llm_stage.cuts]
    if state.stretches and sorted(state.stretches) != layers:
        raise UnsupportedError(
            f"this cache lost tokens before layers {sorted(state.stretches)}, but here they are removed before "
            f"layers {layers}; go on with the method it began with, or start a new cache."
        )


def real_columns(mask: Any, call: Call, embeds: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the new columns, and which of the stored ones, are real: `[batch, length]`, `[batch, stored]`.

    Args:
        mask: the attention mask that the text model is given.
        call: the pass.
        embeds: `[batch, length, dim]` what enters.

    Raises:
        UnsupportedError: the mask is no 2-D mask nor made of one, or a static cache is too small for the prompt.
    """
    batch, length = embeds.shape[:2]
    stored = 0 if call.cache is None else call.cache.stored()
    if isinstance(call.cache, PrunedStaticCache):
        mask = _columns(mask, call.cache, call.seen, length)
    if mask is None:
        mask = torch.ones(batch, length, dtype=torch.bool, device=embeds.device)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise UnsupportedError(
            "compression needs a 2-D attention mask [batch, length]; custom 4-D masks are not supported."
        )
    mask = mask.to(embeds.device).bool()
    past = call.state.mask
    if past is None:
        past = mask[:, :-length] if mask.shape[1] == stored + length else mask.new_ones(batch, stored)
    past = past[:, :stored]
    if past.shape[1] < stored:
        past = torch.cat([past, past.new_ones(batch, stored - past.shape[1])], dim=1)
    return mask[:, -length:], past


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
