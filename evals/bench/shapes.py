"""Models of published sizes without trained weights, and prompts for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from mmcompress.errors import SpecError, unknown_name
from mmcompress.evals.micro.training.architectures import clip_vision, llama, llava
from mmcompress.integrations.hf.families import family_of

Size = tuple[int, int]
"""Width and height of a picture in pixels."""

_BEFORE, _AFTER = 35, 40  # tokens of text before and after the image
_MOST_UNEQUAL = 200  # what Qwen's image processors still take: the longer side over the shorter


@dataclass(frozen=True)
class Shape:
    """A model to be measured.

    Args:
        summary: what it stands for.
        config: makes its configuration.
        picture: model, size -> what one picture becomes: the number of its tokens, and the arguments of `forward`.
        size: of a picture, unless another is given.
    """

    summary: str
    config: Callable[[], Any]
    picture: Callable[[Any, Size], tuple[int, dict[str, Tensor]]]
    size: Size

    def build(self, layers: int | None, device: str, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
        """The model with random weights, cut to `layers` of its LLM, and a prompt with one picture."""
        config = self.config()
        text = config.get_text_config()
        text.pad_token_id = None
        if layers is not None:
            text.num_hidden_layers = layers
            if getattr(text, "layer_types", None):
                text.layer_types = ["full_attention"] * layers
        with torch.device(device):
            model: Any = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
        return model, self.prompt(model, self.size)

    def prompt(self, model: Any, size: Size) -> dict[str, Tensor]:
        """A picture of noise with text around it, for a model that `build` made.

        Raises:
            SpecError: the model takes no pictures of that size.
        """
        tokens, picture = self.picture(model, size)
        ids = torch.full((1, _BEFORE + tokens + _AFTER), 5)
        ids[:, _BEFORE : _BEFORE + tokens] = model.config.image_token_id
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **picture}
        if model.config.model_type.startswith("qwen"):
            inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        return {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }


def shape_of(name: str) -> Shape:
    """The shape of that name.

    Raises:
        SpecError: there is none.
    """
    if name not in SHAPES:
        raise unknown_name("configuration", name, SHAPES)
    return SHAPES[name]


def repeated(inputs: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    """A prompt of one row `batch` times."""
    return {name: torch.cat([part] * batch) for name, part in inputs.items()}


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _square(model: Any, size: Size) -> tuple[int, dict[str, Tensor]]:
    """Whatever its size, the picture is scaled to the encoder's."""
    side = model.config.vision_config.image_size
    return (side // model.config.vision_config.patch_size) ** 2, {"pixel_values": _noise(1, 3, side, side)}


def _tiles(model: Any, size: Size) -> tuple[int, dict[str, Tensor]]:
    """A thumbnail and AnyRes crops; how many tokens are left of them when padding is cut off, the model knows."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    width, height = size
    side = model.config.vision_config.image_size
    rows, columns = get_anyres_image_grid_shape((height, width), model.config.image_grid_pinpoints, side)
    picture = {
        "pixel_values": _noise(1, 1 + rows * columns, 3, side, side),
        "image_sizes": torch.tensor([[height, width]]),
    }
    (layout,) = family_of(model).layouts("image", torch.empty(0), picture)
    return len(layout.separator), picture


def _dynamic(model: Any, size: Size) -> tuple[int, dict[str, Tensor]]:
    """Native resolution, rounded to whole squares of merged patches."""
    if max(size) > _MOST_UNEQUAL * min(size):
        raise SpecError(f"a picture of {size[0]}x{size[1]}: one side is more than {_MOST_UNEQUAL} times the other.")
    vision = model.config.vision_config
    merge = vision.spatial_merge_size
    columns, rows = (merge * max(1, round(side / (vision.patch_size * merge))) for side in size)
    pixels = _noise(rows * columns, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)
    grid = torch.tensor([[1, rows, columns]])
    return rows * columns // merge**2, {"pixel_values": pixels, "image_grid_thw": grid}


def _vicuna(config: Any) -> Any:
    return config(text_config=transformers.LlamaConfig(vocab_size=32064))


def _qwen2_7b(vocabulary: int) -> dict[str, Any]:
    text = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28)
    return text | dict(num_key_value_heads=4, vocab_size=vocabulary)


def _llava_onevision() -> Any:
    return transformers.LlavaOnevisionConfig(text_config=transformers.Qwen2Config(**_qwen2_7b(152000)))


def _qwen2_5_vl() -> Any:
    vision = dict(hidden_size=1280, intermediate_size=3420, out_hidden_size=3584)
    return transformers.Qwen2_5_VLConfig(text_config=_qwen2_7b(152064), vision_config=vision)


def _qwen3_vl() -> Any:
    text: dict[str, Any] = dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36)
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
    text |= dict(num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936, rope_parameters=rope)
    return transformers.Qwen3VLConfig(text_config=text, vision_config=dict(out_hidden_size=4096))


SHAPES: Mapping[str, Shape] = {
    "micro-llava-336": Shape(
        "the embedded model's architecture at 336 px: 576 tokens, 4 layers",
        lambda: llava(clip_vision(336), llama()).config,
        _square,
        (336, 336),
    ),
    "llava-1.5-7b": Shape(
        "LLaVA-1.5-7B: 576 tokens, 32 layers", partial(_vicuna, transformers.LlavaConfig), _square, (336, 336)
    ),
    "llava-next-7b": Shape(
        "LLaVA-NeXT-7B: five tiles, 2,928 tokens, 32 layers",
        partial(_vicuna, transformers.LlavaNextConfig),
        _tiles,
        (672, 672),
    ),
    "llava-onevision-7b": Shape(
        "LLaVA-OneVision-7B: five tiles, 3,699 tokens, 28 layers", _llava_onevision, _tiles, (768, 768)
    ),
    "qwen2.5-vl-7b": Shape("Qwen2.5-VL-7B: 1,296 tokens, 28 layers", _qwen2_5_vl, _dynamic, (1008, 1008)),
    "qwen3-vl-8b": Shape("Qwen3-VL-8B: 1,024 tokens, 36 layers", _qwen3_vl, _dynamic, (1024, 1024)),
}
