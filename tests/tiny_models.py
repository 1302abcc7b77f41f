"""Random models of the embedded families, far smaller than the trained ones, saved as those are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from mmcompress.evals.micro import saving
from mmcompress.evals.micro.vocabulary import TOKENS

SIDE = 56
PINPOINTS = [(SIDE, 2 * SIDE), (2 * SIDE, SIDE), (2 * SIDE, 2 * SIDE)]
# With the usual deviation of 0.02 the logits of so small a model would hardly depend on its input.
DEVIATION = 0.12
_TEXT: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=len(TOKENS),
    max_position_embeddings=4096,
    bos_token_id=TOKENS.index("<s>"),
    eos_token_id=TOKENS.index("</s>"),
    pad_token_id=TOKENS.index("<pad>"),
    initializer_range=DEVIATION,
)


def _llava_settings() -> dict[str, Any]:
    return dict(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=1,
            image_size=SIDE,
            patch_size=14,
            initializer_range=DEVIATION,
        ),
        text_config=transformers.LlamaConfig(num_key_value_heads=1, head_dim=64, **_TEXT),
        image_token_index=TOKENS.index("<image>"),
        image_seq_length=(SIDE // 14) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _llava() -> PreTrainedModel:
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**_llava_settings()))


def _llava_next() -> PreTrainedModel:
    pinpoints = [list(pinpoint) for pinpoint in PINPOINTS]
    config = transformers.LlavaNextConfig(image_grid_pinpoints=pinpoints, **_llava_settings())
    return transformers.LlavaNextForConditionalGeneration(config)


def _qwen() -> PreTrainedModel:
    config = transformers.Qwen2_5_VLConfig(
        vision_config=dict(
            depth=2,
            hidden_size=64,
            intermediate_size=96,
            num_heads=1,
            out_hidden_size=64,
            window_size=56,
            fullatt_block_indexes=[1],
            initializer_range=DEVIATION,
        ),
        text_config=dict(
            num_key_value_heads=1,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]},
            **_TEXT,
        ),
        image_token_id=TOKENS.index("<|image_pad|>"),
        video_token_id=TOKENS.index("<|video_pad|>"),
        vision_start_token_id=TOKENS.index("<|vision_start|>"),
        vision_end_token_id=TOKENS.index("<|vision_end|>"),
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


_BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {"llava": _llava, "llava_next": _llava_next, "qwen2_5_vl": _qwen}
_PROCESSORS = {
    "llava": saving.llava_processor(SIDE),
    "llava_next": saving.llava_next_processor(SIDE, PINPOINTS),
    "qwen2_5_vl": saving.qwen_processor(4 * 28 * 28, 64 * 28 * 28),
}
TINY_MODELS = tuple(_BUILDERS)


def save_tiny_model(name: str, folder: Path) -> PreTrainedModel:
    """Write the tiny model `name` to `folder`; equal names give equal models."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _BUILDERS[name]().eval()
    saving.save(folder, model, TOKENS, _PROCESSORS[name])
    return model
