"""Models of published sizes without trained weights, and one prompt for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from mmcompress.evals.micro.training.architectures import clip_vision, llama, llava

_BEFORE, _AFTER = 35, 40  # tokens of text before and after the image


@dataclass(frozen=True)
class Shape:
    """A model to be measured.

    Args:
        summary: what it stands for.
        config: makes its configuration.
        inputs: configuration -> what one picture becomes: the number of its tokens, and the arguments of `forward`.
    """

    summary: str
    config: Callable[[], Any]
    inputs: Callable[[Any], tuple[int, dict[str, Tensor]]]

    def build(self, layers: int | None, device: str, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
        """The model with random weights, cut to `layers` of its LLM, and a prompt with one picture."""
        config = self.config()
        text = config.get_text_config()
        text.pad_token_id = None
        if layers is not None:
            text.num_hidden_layers = layers
            text.layer_types = ["full_attention"] * layers if getattr(text, "layer_types", None) else None
        with torch.device(device):
            model: Any = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
        tokens, picture = self.inputs(config)
        ids = torch.full((1, _BEFORE + tokens + _AFTER), 5)
        ids[:, _BEFORE : _BEFORE + tokens] = config.image_token_id
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **picture}
        if config.model_type.startswith("qwen"):
            inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
        floats = {
            name: value.to(device, dtype if value.is_floating_point() else None) for name, value in inputs.items()
        }
        return model, floats


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _square(config: Any) -> tuple[int, dict[str, Tensor]]:
    side = config.vision_config.image_size
    return (side // config.vision_config.patch_size) ** 2, {"pixel_values": _noise(1, 3, side, side)}


def _five_tiles(config: Any) -> tuple[int, dict[str, Tensor]]:
    side = config.vision_config.image_size
    across = 2 * side // config.vision_config.patch_size
    picture = {"pixel_values": _noise(1, 5, 3, side, side), "image_sizes": torch.tensor([[2 * side, 2 * side]])}
    return across**2 // 4 + across * (across + 1), picture


def _dynamic(config: Any) -> tuple[int, dict[str, Tensor]]:
    vision, side = config.vision_config, 72
    pixels = _noise(side * side, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)
    return (side // vision.spatial_merge_size) ** 2, {
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }


def _vicuna(config: Any) -> Any:
    return config(text_config=transformers.LlamaConfig(vocab_size=32064))


def _qwen() -> Any:
    text = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28)
    text |= dict(num_key_value_heads=4, vocab_size=152064)
    vision = dict(hidden_size=1280, intermediate_size=3420, out_hidden_size=3584)
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)


SHAPES: Mapping[str, Shape] = {
    "micro-llava-336": Shape(
        "the embedded model's architecture at 336 px: 576 tokens, 4 layers",
        lambda: llava(clip_vision(336), llama()).config,
        _square,
    ),
    "llava-1.5-7b": Shape("LLaVA-1.5-7B: 576 tokens, 32 layers", partial(_vicuna, transformers.LlavaConfig), _square),
    "llava-next-7b": Shape(
        "LLaVA-NeXT-7B: five tiles, 2,928 tokens, 32 layers",
        partial(_vicuna, transformers.LlavaNextConfig),
        _five_tiles,
    ),
    "qwen2.5-vl-7b": Shape("Qwen2.5-VL-7B: 1,296 tokens, 28 layers", _qwen, _dynamic),
}
