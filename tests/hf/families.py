"""Tiny random-weight models of the supported families, each with batches that hold every prompt situation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.image_processing_utils import select_best_resolution

Kind = Literal["mixed", "images", "single", "video", "image_video"]
Inputs = dict[str, Any]

BOS, EOS, PAD, IMAGE, VIDEO, VISION_START, VISION_END, TIMESTAMP = 1, 2, 3, 4, 5, 6, 7, 8
VOCABULARY = 128
SIDE = 56  # pixels of an encoder tile
PATCH = 14
MERGE = 2  # patches merged along each axis, where a family merges them


@dataclass(frozen=True)
class Family:
    """A model family: `build(attn_implementation)` a model, and `inputs(model, kind)` for each of its `kinds`."""

    name: str
    build: Callable[[str], PreTrainedModel]
    inputs: Callable[[PreTrainedModel, Kind], Inputs]
    kinds: tuple[Kind, ...]


def _text_settings(**extra: Any) -> dict[str, Any]:
    return dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **extra,
    )


def _llama() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**_text_settings(head_dim=16))


def _qwen2() -> transformers.Qwen2Config:
    return transformers.Qwen2Config(**_text_settings())


def _tower_settings(**extra: Any) -> dict[str, Any]:
    return (
        dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=PATCH,
        )
        | extra
    )


def _clip() -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(**_tower_settings())


def _llava_config() -> transformers.LlavaConfig:
    return transformers.LlavaConfig(
        vision_config=_clip(),
        text_config=_llama(),
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _llava_next_config() -> transformers.LlavaNextConfig:
    return transformers.LlavaNextConfig(
        vision_config=_clip(),
        text_config=_llama(),
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=[[56, 56], [56, 112], [112, 56], [112, 112]],
    )


def _llava_onevision_config() -> transformers.LlavaOnevisionConfig:
    return transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**_tower_settings(vision_use_head=False)),
        text_config=_qwen2(),
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        video_token_id=VIDEO,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112], [168, 168]],
        vision_aspect_ratio="anyres_max_4",
    )


def _internvl_config() -> transformers.InternVLConfig:
    tower = _tower_settings(image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH])
    return transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**tower),
        text_config=_qwen2(),
        image_token_id=IMAGE,
        downsample_ratio=1 / MERGE,
    )


def _smolvlm_config() -> transformers.SmolVLMConfig:
    return transformers.SmolVLMConfig(
        vision_config=_tower_settings(),
        text_config=_llama(),
        image_token_id=IMAGE,
        pad_token_id=PAD,
        scale_factor=MERGE,
    )


def _qwen_config(config: type, vision: dict[str, Any], text: dict[str, Any], **rope: Any) -> Any:
    patches = dict(num_heads=4, patch_size=PATCH, spatial_merge_size=MERGE, temporal_patch_size=2)
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3], **rope)
    return config(
        vision_config=patches | vision,
        text_config=_text_settings(rope_parameters=rope, **text),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


_QWEN_TOWER = dict(depth=4, hidden_size=32, intermediate_size=64, out_hidden_size=64)


def _qwen2_vl_config() -> transformers.Qwen2VLConfig:
    tower = dict(depth=3, embed_dim=32, hidden_size=64, mlp_ratio=2)
    return _qwen_config(transformers.Qwen2VLConfig, tower, {})


def _qwen2_5_vl_config() -> transformers.Qwen2_5_VLConfig:
    tower = _QWEN_TOWER | dict(window_size=56, fullatt_block_indexes=[1, 3], tokens_per_second=2)
    return _qwen_config(transformers.Qwen2_5_VLConfig, tower, {})


def _qwen3_vl_config() -> transformers.Qwen3VLConfig:
    tower = _QWEN_TOWER | dict(deepstack_visual_indexes=[1, 2], num_position_embeddings=256)
    return _qwen_config(transformers.Qwen3VLConfig, tower, dict(head_dim=16), mrope_interleaved=True)


def _build(model: type[PreTrainedModel], config: Callable[[], Any], attn_implementation: str) -> PreTrainedModel:
    settings = config()
    settings._attn_implementation = attn_implementation
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        built = model(settings)
        # The usual initialisation gives nearly flat attention: without sharpening, selection would change nothing.
        for name, parameter in built.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4.0 if any(part in name for part in ("q_proj", "k_proj", "qkv")) else 2.0)
    return built.eval()


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _left_pad(rows: Sequence[Sequence[int]]) -> Inputs:
    length = max(map(len, rows))
    input_ids = torch.tensor([[PAD] * (length - len(row)) + list(row) for row in rows])
    attention_mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _prompts(items_per_row: Sequence[int], runs: Sequence[Sequence[int]]) -> Inputs:
    """Left-padded rows of ragged length: text around the placeholder `runs`, dealt out by `items_per_row`."""
    left, rows = iter(runs), []
    for number, count in enumerate(items_per_row):
        word = 20 + 25 * number
        row = [BOS, *range(word, word + 2 + number)]
        for place in range(count):
            row += [*next(left), word + 10 + place]
        rows.append([*row, *range(word + 15, word + 18 + 2 * (number % 2))])
    return _left_pad(rows)


_IMAGES_PER_ROW: dict[Kind, tuple[int, ...]] = {"mixed": (1, 2, 0), "images": (1, 2), "single": (1,)}


def _llava_inputs(model: PreTrainedModel, kind: Kind) -> Inputs:
    rows = _IMAGES_PER_ROW[kind]
    tokens = (SIDE // PATCH) ** 2
    return _prompts(rows, [[IMAGE] * tokens] * sum(rows)) | {"pixel_values": _noise(sum(rows), 3, SIDE, SIDE)}


def _tile_stack(tiles: Sequence[int]) -> Tensor:
    """`[images, most tiles, 3, SIDE, SIDE]`, zero beyond each image's number of tiles."""
    stack = torch.zeros(len(tiles), max(tiles), 3, SIDE, SIDE)
    for image, count in enumerate(tiles):
        stack[image, :count] = _noise(count, 3, SIDE, SIDE, seed=image)
    return stack


def _tiles(model: PreTrainedModel, size: tuple[int, int]) -> int:
    height, width = select_best_resolution(size, model.config.image_grid_pinpoints)
    return 1 + (height // SIDE) * (width // SIDE)


def _image_runs(model: PreTrainedModel, media: Inputs) -> list[list[int]]:
    with torch.no_grad():
        features = model.base_model.get_image_features(**media, return_dict=True).pooler_output
    return [[IMAGE] * len(image) for image in features]


def _llava_next_inputs(model: PreTrainedModel, kind: Kind) -> Inputs:
    rows = _IMAGES_PER_ROW[kind]
    sizes = [(40, 100), (100, 60), (50, 50)][: sum(rows)]  # landscape, portrait with padding cut off, a single crop
    media = {
        "pixel_values": _tile_stack([_tiles(model, size) for size in sizes]),
        "image_sizes": torch.tensor(sizes),
    }
    return _prompts(rows, _image_runs(model, media)) | media


def _onevision_images(model: PreTrainedModel, rows: Sequence[int], sizes: Sequence[tuple[int, int]]) -> Inputs:
    # A prompt with several images gets no crops: the model itself decides so from `batch_num_images`.
    alone = [count == 1 for count in rows for _ in range(count)]
    return {
        "pixel_values": _tile_stack(
            [_tiles(model, size) if one else 1 for size, one in zip(sizes, alone, strict=True)]
        ),
        "image_sizes": torch.tensor(sizes),
        "batch_num_images": torch.tensor(rows),
    }


def _llava_onevision_inputs(model: PreTrainedModel, kind: Kind) -> Inputs:
    frames = 3
    video_run = [VIDEO] * (frames * (SIDE // PATCH // 2) ** 2 + 1)
    videos = {"pixel_values_videos": _noise(2, frames, 3, SIDE, SIDE)}
    if kind == "video":
        return _prompts((1, 1), [video_run] * 2) | videos
    if kind == "image_video":
        media = _onevision_images(model, (1, 0), [(50, 100)])
        return _prompts((2, 1), [*_image_runs(model, media), video_run, video_run]) | media | videos
    rows = (*_IMAGES_PER_ROW[kind], *((1,) if kind != "single" else ()))
    # The image of 160 x 150 has more crops than `anyres_max_4` allows: its stitched plane is resized.
    sizes = [(160, 150)] if kind == "single" else [(50, 100), (100, 60), (50, 50), (160, 150)]
    media = _onevision_images(model, rows, sizes)
    return _prompts(rows, _image_runs(model, media)) | media


def _internvl_inputs(model: PreTrainedModel, kind: Kind) -> Inputs:
    rows = _IMAGES_PER_ROW[kind]
    tiles = (1, 3, 2)[: sum(rows)]
    tokens = (SIDE // PATCH // MERGE) ** 2
    return _prompts(rows, [[IMAGE] * tokens * count for count in tiles]) | {
        "pixel_values": _noise(sum(tiles), 3, SIDE, SIDE)
    }


def _smolvlm_inputs(model: PreTrainedModel, kind: Kind) -> Inputs:
    rows = _IMAGES_PER_ROW[kind]
    tokens = (SIDE // PATCH // MERGE) ** 2
    # All-zero images fill up the rows that have fewer: the model drops them.
    pixel_values = torch.zeros(len(rows), max(rows), 3, SIDE, SIDE)
    for row, count in enumerate(rows):
        pixel_values[row, :count] = _noise(count, 3, SIDE, SIDE, seed=row)
    return _prompts(rows, [[IMAGE] * tokens] * sum(rows)) | {
        "pixel_values": pixel_values,
        "pixel_attention_mask": pixel_values.ne(0).any(2).long(),
    }


def _qwen_run(token: int, grid: tuple[int, int, int], split_frames: bool) -> list[int]:
    frames, height, width = grid
    tokens = height * width // MERGE**2
    if split_frames:
        return [TIMESTAMP, VISION_START, *[token] * tokens, VISION_END] * frames
    return [VISION_START, *[token] * tokens * frames, VISION_END]


def _qwen_pixels(grids: Sequence[tuple[int, int, int]], seed: int) -> Tensor:
    return _noise(sum(t * h * w for t, h, w in grids), 3 * 2 * PATCH * PATCH, seed=seed)


def _qwen_inputs(model: PreTrainedModel, kind: Kind) -> Inputs:
    images, videos = [(1, 8, 12), (1, 4, 6), (1, 10, 4)], [(2, 4, 4), (3, 4, 6)]
    # Qwen3-VL puts every frame behind a timestamp of its own.
    split = model.config.model_type == "qwen3_vl"
    video_runs = [_qwen_run(VIDEO, grid, split) for grid in videos]
    if kind in ("video", "image_video"):
        images = images[1:2] if kind == "image_video" else []
    else:
        images, videos = images[: sum(_IMAGES_PER_ROW[kind])], []
    image_runs = [_qwen_run(IMAGE, grid, False) for grid in images]
    rows = {"video": (1, 1), "image_video": (2, 1)}.get(kind) or _IMAGES_PER_ROW[kind]
    inputs = _prompts(rows, image_runs + video_runs if videos else image_runs)
    ids = inputs["input_ids"]
    inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    if images:
        inputs |= {"pixel_values": _qwen_pixels(images, 0), "image_grid_thw": torch.tensor(images)}
    if videos:
        inputs |= {"pixel_values_videos": _qwen_pixels(videos, 1), "video_grid_thw": torch.tensor(videos)}
        if model.config.model_type == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = torch.tensor([1.0, 0.5])
    return inputs


_IMAGE_KINDS: tuple[Kind, ...] = ("mixed", "images", "single")
_ALL_KINDS: tuple[Kind, ...] = (*_IMAGE_KINDS, "video", "image_video")


def _family(name: str, model: type, config: Callable[[], Any], inputs: Any, kinds: tuple[Kind, ...]) -> Family:
    return Family(name, partial(_build, model, config), inputs, kinds)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _family("llava", transformers.LlavaForConditionalGeneration, _llava_config, _llava_inputs, _IMAGE_KINDS),
        _family(
            "llava_next",
            transformers.LlavaNextForConditionalGeneration,
            _llava_next_config,
            _llava_next_inputs,
            _IMAGE_KINDS,
        ),
        _family(
            "llava_onevision",
            transformers.LlavaOnevisionForConditionalGeneration,
            _llava_onevision_config,
            _llava_onevision_inputs,
            _ALL_KINDS,
        ),
        _family("qwen2_vl", transformers.Qwen2VLForConditionalGeneration, _qwen2_vl_config, _qwen_inputs, _ALL_KINDS),
        _family(
            "qwen2_5_vl", transformers.Qwen2_5_VLForConditionalGeneration, _qwen2_5_vl_config, _qwen_inputs, _ALL_KINDS
        ),
        _family("qwen3_vl", transformers.Qwen3VLForConditionalGeneration, _qwen3_vl_config, _qwen_inputs, _ALL_KINDS),
        _family(
            "internvl", transformers.InternVLForConditionalGeneration, _internvl_config, _internvl_inputs, _IMAGE_KINDS
        ),
        _family(
            "smolvlm", transformers.SmolVLMForConditionalGeneration, _smolvlm_config, _smolvlm_inputs, _IMAGE_KINDS
        ),
    )
}
