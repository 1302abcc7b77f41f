"""The cost formulas, against counted FLOPs and real cache bytes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from mmcompress.accounting import ItemStats, LLMShape, StageSeconds, Stats
from mmcompress.integrations.hf.account import llm_shape

CONFIGS = {
    "grouped": dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=8),
    "multi-head": dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=4),
    "wide heads": dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=1, head_dim=24),
}


def llama(settings: dict[str, int], dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **settings, intermediate_size=80, num_hidden_layers=3, vocab_size=101, attn_implementation="eager"
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_prefill_flops_are_what_torch_counts(settings: dict[str, int], tokens: int) -> None:
    model = llama(settings)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(tokens)[None], logits_to_keep=1)
    shape = llm_shape(model.model)
    # Exact, but for the angles of RoPE: some versions of transformers compute them as a matrix product.
    rotary_angles = tokens * shape.head_dim
    assert counter.get_total_flops() - shape.prefill_flops([tokens] * shape.layers) in (0, rotary_angles)


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_bytes_are_those_of_the_cache(settings: dict[str, int], dtype: torch.dtype) -> None:
    model = llama(settings, dtype)
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.arange(13)[None], past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert llm_shape(model.model).kv_bytes([13] * 3) == held


def test_shape_of_a_config_without_optional_entries() -> None:
    config = SimpleNamespace(
        num_hidden_layers=2, hidden_size=12, num_attention_heads=3, intermediate_size=20, vocab_size=50
    )
    shape = llm_shape(SimpleNamespace(config=config, dtype=torch.float16))
    assert shape == LLMShape(2, 12, 3, 3, 4, 20, 50, 2)


def test_stats_add_up_over_items_and_rows() -> None:
    shape = LLMShape(2, 8, 2, 1, 4, 16, 32, 2)
    items = [ItemStats(0, "image", 100, 25, 3), ItemStats(0, "image", 40, 10, 0), ItemStats(1, "video", 60, 15, 1)]
    stats = Stats(items, [150, 70], [60, 25], shape, seconds=StageSeconds(encoder=1.5))
    assert (stats.tokens, stats.kept, stats.retained) == (200, 50, 0.25)
    assert stats.tokens_per_layer == [50 / 3] * 2
    assert stats.prefill_flops == shape.prefill_flops([60, 60]) + shape.prefill_flops([25, 25])
    assert stats.prefill_flops_full == shape.prefill_flops([150, 150]) + shape.prefill_flops([70, 70])
    assert stats.kv_bytes == shape.kv_bytes([85, 85])
    assert stats.kv_bytes_full == shape.kv_bytes([220, 220])
    assert "50 of 200 visual tokens kept (25.0%) in 3 items" in str(stats)
    assert "encoder 1.500" in str(stats)


def test_tokens_removed_inside_the_llm_count_up_to_their_layer() -> None:
    shape = LLMShape(4, 8, 2, 1, 4, 16, 32, 2)
    items = [ItemStats(0, "image", 100, 40, 0), ItemStats(1, "image", 100, 20, 0)]
    stats = Stats(items, [110, 105], [50, 25], shape, row_left={1: [30, 25], 3: [20, 15]})
    assert (stats.kept, stats.tokens_per_layer) == (60, [30, 20, 20, 10])
    assert stats.prefill_flops == shape.prefill_flops([50, 30, 30, 20]) + shape.prefill_flops([25, 25, 25, 15])
    assert stats.kv_bytes == shape.kv_bytes([75, 55, 55, 35])


def test_stats_of_no_items() -> None:
    stats = Stats([], [5], [5], LLMShape(2, 8, 2, 1, 4, 16, 32, 2))
    assert (stats.tokens, stats.kept, stats.retained, stats.tokens_per_layer) == (0, 0, 1.0, [0.0, 0.0])
    assert stats.prefill_flops == stats.prefill_flops_full
