"""Random models of the families of which no trained one is embedded, saved as those are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import DEVIATION, PINPOINTS, SIDE
from transformers import PreTrainedModel

from mmcompress.evals.micro import saving
from mmcompress.evals.micro.vocabulary import TOKENS

_TEXT: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=len(TOKENS),
    max_position_embeddings=4096,
    bos_token_id=TOKENS.index("<s>"),
    eos_token_id=TOKENS.index("</s>"),
    pad_token_id=TOKENS.index("<pad>"),
    initializer_range=DEVIATION,
)
_TOKEN_IDS = dict(
    image_token_id=TOKENS.index("<|image_pad|>"),
    video_token_id=TOKENS.index("<|video_pad|>"),
    vision_start_token_id=TOKENS.index("<|vision_start|>"),
    vision_end_token_id=TOKENS.index("<|vision_end|>"),
)


def _llava_onevision() -> PreTrainedModel:
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=14,
            vision_use_head=False,
        ),
        text_config=transformers.Qwen2Config(**_TEXT),
        image_token_index=TOKENS.index("<image>"),
        video_token_index=TOKENS.index("<|video_pad|>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[list(pinpoint) for pinpoint in (*PINPOINTS, (4 * SIDE, 4 * SIDE))],
        vision_aspect_ratio="anyres_max_9",
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def _rope(**extra: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6], **extra}


def _qwen2_vl() -> PreTrainedModel:
    tower = dict(depth=3, embed_dim=64, hidden_size=64, mlp_ratio=2, num_heads=2, initializer_range=DEVIATION)
    config = transformers.Qwen2VLConfig(
        vision_config=tower, text_config=dict(rope_parameters=_rope(), **_TEXT), **_TOKEN_IDS
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def _qwen3_vl() -> PreTrainedModel:
    tower = dict(
        depth=4,
        hidden_size=64,
        intermediate_size=96,
        num_heads=2,
        out_hidden_size=64,
        patch_size=14,
        deepstack_visual_indexes=[1, 2],
        num_position_embeddings=256,
        initializer_range=DEVIATION,
    )
    text = dict(rope_parameters=_rope(mrope_interleaved=True), head_dim=32, **_TEXT)
    config = transformers.Qwen3VLConfig(vision_config=tower, text_config=text, **_TOKEN_IDS)
    return transformers.Qwen3VLForConditionalGeneration(config)


def _processor(name: str, base: saving.ProcessorFiles, **parts: dict[str, Any]) -> saving.ProcessorFiles:
    settings = {**base.settings, "processor_class": name}
    for part, changes in parts.items():
        settings[part] = {**settings.get(part, {}), **changes}
    return saving.ProcessorFiles(settings, base.chat_template)


def _onevision_processor() -> saving.ProcessorFiles:
    base = saving.llava_next_processor(SIDE, [*PINPOINTS, (4 * SIDE, 4 * SIDE)])
    settings = {key: base.settings[key] for key in ("image_processor", "image_token")}
    images = {key: value for key, value in settings["image_processor"].items() if key != "crop_size"}
    images |= {"image_processor_type": "LlavaOnevisionImageProcessor"}
    clip = {key: images[key] for key in ("size", "image_mean", "image_std")}
    return saving.ProcessorFiles(
        {
            **settings,
            "processor_class": "LlavaOnevisionProcessor",
            "image_processor": images,
            "video_processor": {"video_processor_type": "LlavaOnevisionVideoProcessor", **clip},
            "num_image_tokens": (SIDE // 14) ** 2,
            "vision_feature_select_strategy": "full",
            "video_token": "<|video_pad|>",
            "vision_aspect_ratio": "anyres_max_9",
        },
        base.chat_template,
    )


_QWEN = saving.qwen_processor(4 * 28 * 28, 64 * 28 * 28)
_MODELS: dict[str, tuple[Callable[[], PreTrainedModel], saving.ProcessorFiles]] = {
    "llava_onevision": (_llava_onevision, _onevision_processor()),
    "qwen2_vl": (_qwen2_vl, _processor("Qwen2VLProcessor", _QWEN)),
    "qwen3_vl": (
        _qwen3_vl,
        _processor("Qwen3VLProcessor", _QWEN, video_processor={"video_processor_type": "Qwen3VLVideoProcessor"}),
    ),
}
MORE_MODELS = tuple(_MODELS)


def save_more_model(name: str, folder: Path) -> None:
    """Write the model `name` to `folder`; equal names give equal models."""
    build, processor = _MODELS[name]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build().eval()
        for tower in (part for name, part in model.named_modules() if name.endswith(("visual", "vision_tower"))):
            for parameter in tower.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(std=DEVIATION)
    saving.save(folder, model, TOKENS, processor)
