"""The stock models that are trained, and the initialisation that lets so narrow a language model learn."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from mmcompress.evals.micro.vocabulary import TOKENS

TOKEN_IDS: dict[str, int] = {token: number for number, token in enumerate(TOKENS)}
"""The vocabulary that all models share."""

END_OF_TEXT = len(TOKENS) - 1
"""Ends a text for the text tower; a CLIP whose end token is 2 would pool at the largest id instead."""

_SPECIAL: dict[str, Any] = {
    "bos_token_id": TOKEN_IDS["<s>"],
    "eos_token_id": TOKEN_IDS["</s>"],
    "pad_token_id": TOKEN_IDS["<pad>"],
}
_POSITIONS = 4096
_EMBEDDING_RMS = 0.7


def clip_vision(image_size: int, hidden: int = 192, layers: int = 6) -> CLIPVisionConfig:
    """A CLIP ViT with 64-wide heads and 14 px patches for pictures of `image_size` px."""
    return CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        image_size=image_size,
        patch_size=14,
        projection_dim=128,
    )


def llama(hidden: int = 192, layers: int = 4) -> LlamaConfig:
    """A Llama with grouped-query attention: four 64-wide query heads share two key-value heads."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=448 * hidden // 192,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=len(TOKENS),
        max_position_embeddings=_POSITIONS,
        tie_word_embeddings=False,
        **_SPECIAL,
    )


def llava(vision: CLIPVisionConfig, text: LlamaConfig) -> LlavaForConditionalGeneration:
    """A LLaVA-1.5 that reads the last but one layer of its encoder."""
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=TOKEN_IDS["<image>"],
        image_seq_length=_patches(vision),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


def llava_next(vision: CLIPVisionConfig, text: LlamaConfig) -> LlavaNextForConditionalGeneration:
    """A LLaVA-NeXT: a thumbnail and up to four tiles, in the grids 1x2, 2x1, 2x2, 1x3 and 3x1."""
    side = cast(int, vision.image_size)
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=TOKEN_IDS["<image>"],
        image_seq_length=_patches(vision),
        image_grid_pinpoints=[
            [side * rows, side * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
        ],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    return LlavaNextForConditionalGeneration(config)


def qwen(
    vision_hidden: int = 192, depth: int = 4, hidden: int = 256, layers: int = 4
) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL: windowed ViT with two full-attention layers, 2x2 patch merger, M-RoPE."""
    # A picture is a dozen merged patches wide: at the usual base of 1e4 or more, columns would hardly turn anything.
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [8, 12, 12]}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": depth,
            "hidden_size": vision_hidden,
            "intermediate_size": 2 * vision_hidden,
            "num_heads": vision_hidden // 64,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [depth // 2 - 1, depth - 1],
        },
        text_config={
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 64,
            "num_key_value_heads": 2,
            "vocab_size": len(TOKENS),
            "max_position_embeddings": _POSITIONS,
            "rope_parameters": rope,
            "tie_word_embeddings": False,
            **_SPECIAL,
        },
        image_token_id=TOKEN_IDS["<|image_pad|>"],
        video_token_id=TOKEN_IDS["<|video_pad|>"],
        vision_start_token_id=TOKEN_IDS["<|vision_start|>"],
        vision_end_token_id=TOKEN_IDS["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def clip(vision: CLIPVisionConfig) -> CLIPModel:
    """A CLIP around the encoder `vision`, with a two-layer text tower over the shared vocabulary."""
    text = CLIPTextConfig(
        vocab_size=len(TOKENS),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=128,
        bos_token_id=TOKEN_IDS["<s>"],
        eos_token_id=END_OF_TEXT,
        pad_token_id=TOKEN_IDS["<pad>"],
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))


def _patches(vision: CLIPVisionConfig) -> int:
    return (cast(int, vision.image_size) // cast(int, vision.patch_size)) ** 2


@torch.no_grad()
def initialise_encoder(tower: Any) -> None:
    """Let a CLIP ViT start out looking at similar and nearby patches; learning to takes it thousands of pictures.

    Positions are sines and cosines of row and column, queries and keys start equal (after "Mimetic Initialization of
    Self-Attention Layers", arXiv:2305.09828).
    """
    (embeddings,) = (layer.weight for name, layer in tower.named_modules() if name.endswith("position_embedding"))
    side = math.isqrt(len(embeddings) - 1)
    embeddings[1:] = 0.25 * _sines(side, embeddings.shape[1])
    for module in tower.modules():
        if hasattr(module, "q_proj"):
            nn.init.normal_(module.q_proj.weight, 0, 0.065)
            module.k_proj.weight.copy_(module.q_proj.weight)


def _sines(side: int, dim: int) -> Tensor:
    """Sines and cosines of the row, then of the column, for a square of patches [side * side, dim]."""
    angles = torch.arange(side)[:, None] * 100.0 ** -(torch.arange(dim // 4) / (dim // 4))
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    return torch.cat([waves[:, None].expand(-1, side, -1), waves.expand(side, -1, -1)], 2).flatten(0, 1)


@torch.no_grad()
def initialise_language_model(model: Any, feature_rms: float) -> None:
    """Give the language model and the projector weights of the scale their width needs.

    The stock deviation of 0.02 is far too small below a width of 500: the model then learns what a picture contains
    but not what belongs together.

    Args:
        model: a LLaVA, LLaVA-NeXT or Qwen2.5-VL.
        feature_rms: root mean square of what enters the projector.
    """
    language_model = model.model.language_model
    depth_scale = (2 * len(language_model.layers)) ** -0.5
    for name, weight in language_model.named_parameters():
        if weight.ndim == 2 and "embed_tokens" not in name:
            nn.init.normal_(weight, 0, weight.shape[1] ** -0.5)
            if "o_proj" in name or "down_proj" in name:
                weight.mul_(depth_scale)
    nn.init.normal_(language_model.embed_tokens.weight, 0, _EMBEDDING_RMS)
    nn.init.normal_(model.lm_head.weight, 0, 0.04)
    first, second = projector_weights(model)
    nn.init.normal_(first, 0, first.shape[1] ** -0.5 / feature_rms)
    nn.init.normal_(second, 0, 1.2 * second.shape[1] ** -0.5)  # a visual token then enters as large as a word
    if hasattr(model.model, "image_newline"):
        nn.init.normal_(model.model.image_newline, 0, _EMBEDDING_RMS)


def projector(model: Any) -> nn.Module:
    """What turns vision features into LLM embeddings."""
    return model.model.visual.merger if hasattr(model.model, "visual") else model.model.multi_modal_projector


def projector_weights(model: Any) -> tuple[Tensor, Tensor]:
    """The weights of the projector's two linear layers."""
    first, second = (module.weight for module in projector(model).modules() if isinstance(module, nn.Linear))
    return first, second


def parameters(model: nn.Module) -> str:
    """The number of parameters, in millions."""
    return f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.2f}M"
