"""The ground truth: items, statistics and compressed logits recomputed by hand, without cache, padding or hooks."""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from hf.fake_flash import attention_implementation
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.image_processing_utils import select_best_resolution

from mmcompress.types import EncoderFacts, Modality, Positions, Selection, Space, VisualItem

Inputs = Mapping[str, Any]
Grids = tuple[tuple[int, int], ...]

_CLS_FAMILIES = ("llava", "llava_next", "internvl")
_TOKENWISE_FAMILIES = ("llava", "llava_next")  # whose projector maps each token by itself, with nothing behind it
_QWEN_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_MEDIA: dict[Modality, tuple[str, ...]] = {
    "image": ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images", "pixel_attention_mask"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}


@dataclass(frozen=True)
class ReferenceItem:
    """A visual item and where it stands.

    Args:
        row: batch row.
        positions: `[tokens]`, columns of its candidates in the padded row.
        separators: `[newlines]`, columns of its newline tokens.
        item: the item as a method should see it, with the statistics of all encoder layers.
        align: `[tokens, patches]`, each token as a weighted mean of the item's patches.
    """

    row: int
    positions: Tensor
    separators: Tensor
    item: VisualItem
    align: Tensor


@dataclass(frozen=True)
class Recomputed:
    """Greedy decoding: `tokens` as `[rows][steps]` and `logits` as `[rows, steps, vocabulary]`."""

    tokens: list[list[int]]
    logits: Tensor


# --- the uncompressed prompt


@dataclass(frozen=True)
class _Row:
    """One prompt, or what is left of it.

    Args:
        embeddings: `[length, dim]`.
        positions: `[length]`, or `[3, length]` with M-RoPE.
        visual: `[length]`, which tokens are placeholders.
        deepstack: per level `[length, dim]`, zero at text tokens; None without DeepStack or without images.
        following: position of the first generated token.
    """

    embeddings: Tensor
    positions: Tensor
    visual: Tensor
    deepstack: tuple[Tensor, ...] | None
    following: int


def _token_id(model: PreTrainedModel, modality: Modality) -> int | None:
    return getattr(model.config, f"{modality}_token_id", None)


def _flat(features: Any) -> Tensor:
    """`[tokens, dim]`, whatever the container is in this version."""
    parts = [features] if isinstance(features, Tensor) else list(features)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def _tokens(model: PreTrainedModel, output: Any, tokens: int) -> Tensor:
    """`[tokens, dim]` features for that many placeholders, newlines included."""
    features = output.pooler_output
    if isinstance(features, Tensor) and features.shape[:-1].numel() < tokens:
        # Until 5.17, OneVision ends clips with their newline only after `get_video_features`.
        newline = model.base_model.image_newline.expand(len(features), 1, -1)
        features = torch.cat([features, newline], 1)
    return _flat(features)


def _encode(model: PreTrainedModel, inputs: Inputs, modality: Modality) -> Any:
    """The model's own features of all images or videos; None if the inputs have none."""
    media = {name: inputs[name] for name in _MEDIA[modality] if inputs.get(name) is not None}
    if not media:
        return None
    # The pixels go by position: versions disagree on what OneVision calls those of a video.
    pixels = media.pop(_MEDIA[modality][0])
    return getattr(model.base_model, f"get_{modality}_features")(pixels, **media, return_dict=True)


def _rope(model: PreTrainedModel, family_name: str, inputs: Inputs) -> Tensor:
    """`[rows, length]`, or `[3, rows, length]` with M-RoPE."""
    valid = inputs["attention_mask"]
    if family_name not in _QWEN_FAMILIES:
        return (valid.cumsum(-1) - 1).clamp(min=0)
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
    names += ("second_per_grid_ts",)  # Qwen2.5-VL alone
    return model.base_model.get_rope_index(**{name: inputs[name] for name in names if name in inputs})[0]


def _prompt(model: PreTrainedModel, family_name: str, inputs: Inputs) -> list[_Row]:
    """The padded rows as the text model would get them."""
    ids = inputs["input_ids"]
    embeddings = model.get_input_embeddings()(ids)
    visual = torch.zeros_like(ids, dtype=torch.bool)
    levels: list[Tensor] = []
    for modality in _MEDIA:
        output = _encode(model, inputs, modality)
        if output is None:
            continue
        mask = ids == _token_id(model, modality)
        visual |= mask
        embeddings = embeddings.masked_scatter(mask[..., None], _tokens(model, output, int(mask.sum())))
        planes = getattr(output, "deepstack_features", None) or []
        levels = levels or [torch.zeros_like(embeddings) for _ in planes]
        levels = [
            level.masked_scatter(mask[..., None], _flat(plane)) for level, plane in zip(levels, planes, strict=True)
        ]
    positions = _rope(model, family_name, inputs)
    valid = inputs["attention_mask"].bool()
    return [
        _Row(
            embeddings[row],
            positions[..., row, :],
            visual[row],
            tuple(level[row] for level in levels) if levels and visual[row].any() else None,
            int(positions[..., row, :][..., valid[row]].max()) + 1,
        )
        for row in range(len(ids))
    ]


# --- what the encoder looked at


@dataclass(frozen=True)
class _Layout:
    """How the tokens of one item come from encoder patches.

    Args:
        grids: planes, as in `VisualItem`.
        tiles: `[tokens]`, as in `VisualItem`.
        align: `[tokens + separators, patches]`, each token as a weighted mean of patches; NaN rows are separators.
        crops: as in `VisualItem`.
    """

    grids: Grids
    tiles: Tensor
    align: Tensor
    crops: tuple[int, int] | None = None


def _grouped(groups: Tensor) -> Tensor:
    """`[tokens, group]` patch numbers -> `[tokens, patches]` matrix of means."""
    return functional.one_hot(groups, int(groups.max()) + 1).float().mean(1)


def _crop_tiles(module: Any, size: Sequence[int], crops: tuple[int, int], side: int, grid: tuple[int, int]) -> Tensor:
    """`[rows * columns]`: the crop in which the centre of each token of the stitched plane falls."""
    rows, columns = torch.meshgrid(torch.arange(crops[0] * side), torch.arange(crops[1] * side), indexing="ij")
    area = module.unpad_image(torch.stack([rows, columns]), tuple(size))
    (top, left), (height, width) = area[:, 0, 0].tolist(), area.shape[1:]
    row = top + (2 * torch.arange(grid[0]) + 1) * height // (2 * grid[0])
    column = left + (2 * torch.arange(grid[1]) + 1) * width // (2 * grid[1])
    return (1 + (row // side)[:, None] * crops[1] + column // side).flatten()


def _tiled_layout(model: PreTrainedModel, family_name: str, image_size: Tensor, cropped: bool) -> _Layout:
    """LLaVA-NeXT and OneVision: the model's own packer, run on one channel per patch with NaN as newline."""
    base, config = model.base_model, model.config
    tower = config.vision_config
    side = tower.image_size // tower.patch_size
    height, width = select_best_resolution(image_size.tolist(), config.image_grid_pinpoints)
    crops = (height // tower.image_size, width // tower.image_size)
    tiles = 1 + crops[0] * crops[1] if cropped else 1
    patches = tiles * side**2
    strategy = (
        {"vision_feature_select_strategy": config.vision_feature_select_strategy}
        if family_name == "llava_next"
        else {"vision_aspect_ratio": config.vision_aspect_ratio}
    )
    channels = torch.eye(patches).view(tiles, side**2, patches)
    newline = torch.full((patches,), float("nan"))
    packed, _ = base.pack_image_features([channels], image_size[None], image_newline=newline, **strategy)
    align = packed[0]
    thumbnail = torch.zeros(side**2, dtype=torch.long)
    if not cropped:
        return _Layout(((side, side),), thumbnail, align)
    newlines = align[side**2 :].isnan().any(-1).nonzero().flatten()
    stitched = (len(newlines), int(newlines[0]))
    crop_tiles = _crop_tiles(sys.modules[type(base).__module__], image_size.tolist(), crops, side, stitched)
    return _Layout(((side, side), stitched), torch.cat([thumbnail, crop_tiles]), align, crops)


def _shuffled_layout(model: PreTrainedModel, family_name: str, tiles: int) -> _Layout:
    """InternVL and SmolVLM: the model's own pixel shuffle, run on patch numbers."""
    tower = model.config.vision_config
    pixels, patch = (size if isinstance(size, int) else size[0] for size in (tower.image_size, tower.patch_size))
    side = pixels // patch
    numbers = torch.arange(side**2)
    if family_name == "internvl":
        shuffled = model.base_model.pixel_shuffle(numbers.view(1, side, side, 1), model.config.downsample_ratio)
    else:
        shuffled = model.base_model.connector.pixel_shuffle(numbers.view(1, -1, 1), model.config.scale_factor)
    groups = shuffled.reshape(-1, shuffled.shape[-1])
    merged = int(len(groups) ** 0.5)
    align = torch.block_diag(*[_grouped(groups)] * tiles)
    # Where InternVL cuts an image into several tiles, the last is the thumbnail, which has number 0.
    numbers = (torch.arange(tiles) + 1) % tiles
    return _Layout(((merged, merged),) * tiles, numbers.repeat_interleave(len(groups)), align)


def _pooled_video_layout(model: PreTrainedModel, frames: int) -> _Layout:
    """OneVision clips: the model's own pooling, run on one channel per patch; one newline ends the clip."""
    tower = model.config.vision_config
    patches = (tower.image_size // tower.patch_size) ** 2
    frame = model.base_model.apply_pooling(torch.eye(patches)[None])[0]
    side = int(len(frame) ** 0.5)
    align = torch.block_diag(*[frame] * frames)
    newline = torch.full((1, align.shape[1]), float("nan"))
    tiles = torch.arange(frames).repeat_interleave(len(frame))
    return _Layout(((side, side),) * frames, tiles, torch.cat([align, newline]))


def _merged_layout(model: PreTrainedModel, grid: Sequence[int]) -> _Layout:
    """Qwen: patches arrive in merge groups; one plane per temporal step."""
    merge = model.config.vision_config.spatial_merge_size
    frames, height, width = grid[0], grid[1] // merge, grid[2] // merge
    tokens = frames * height * width
    tiles = torch.arange(frames).repeat_interleave(height * width)
    return _Layout(((height, width),) * frames, tiles, _grouped(torch.arange(tokens * merge**2).view(tokens, -1)))


def _run_lengths(mask: Tensor) -> list[int]:
    """Lengths of the contiguous runs of a `[rows, length]` mask, row-major."""
    edges = functional.pad(mask.long(), (1, 1)).diff(dim=-1)
    return ((edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]).tolist()


def _layouts(model: PreTrainedModel, family_name: str, inputs: Inputs, modality: Modality) -> list[_Layout]:
    """One layout per item of a modality, in row-major order."""
    if family_name in _QWEN_FAMILIES:
        return [_merged_layout(model, grid) for grid in inputs[f"{modality}_grid_thw"].tolist()]
    if modality == "video":
        videos, frames = inputs["pixel_values_videos"].shape[:2]
        return [_pooled_video_layout(model, frames)] * videos
    if "image_sizes" in inputs:
        sizes = inputs["image_sizes"]
        counts = inputs.get("batch_num_images")
        # OneVision crops an image only if it is alone in its prompt.
        cropped = [True] * len(sizes) if counts is None else [n == 1 for n in counts.tolist() for _ in range(n)]
        return [_tiled_layout(model, family_name, size, one) for size, one in zip(sizes, cropped, strict=True)]
    runs = _run_lengths(inputs["input_ids"] == _token_id(model, "image"))
    if family_name == "llava":
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        one = _Layout(((side, side),), torch.zeros(side**2, dtype=torch.long), torch.eye(side**2))
        return [one] * len(runs)
    tile = len(_shuffled_layout(model, family_name, 1).tiles)
    return [_shuffled_layout(model, family_name, run // tile) for run in runs]


# --- statistics from maps


def _attention_modules(encoder: nn.Module) -> list[nn.Module]:
    """The attention modules of an encoder, by layer."""
    return [module for module in encoder.modules() if type(module).__name__.endswith("Attention")]


def _projector(base: nn.Module) -> nn.Module:
    for path in ("multi_modal_projector", "connector", "visual.merger"):
        try:
            return base.get_submodule(path)
        except AttributeError:
            continue
    raise AttributeError(f"{type(base).__name__} has no known projector")


def _call_statistics(query: Tensor, key: Tensor, maps: Tensor, scaling: float, has_cls: bool) -> dict[str, Tensor]:
    """One attention call, `[B, H, N, d]` and `[B, H, N, N]`, as per-patch values `[B * patches, ...]`."""
    heads = key.transpose(1, 2)
    values = {
        "received_attention": maps.mean((1, 2)),
        "keys": heads.flatten(2),
        "key_metric": heads.mean(2),
    }
    if has_cls:
        wide_query, wide_key = query[:, :, 0].flatten(1), heads.flatten(2)
        wide = torch.einsum("bc,bnc->bn", wide_query, wide_key) * wide_key.shape[-1] ** -0.5
        values |= {
            "cls_rows": maps[:, :, 0].transpose(1, 2),
            "cls_logits": torch.einsum("bhd,bhnd->bhn", query[:, :, 0], key).mean(1) * scaling,
            "cls_rows_full_width": wide.softmax(-1),
        }
        values = {name: value[:, 1:] for name, value in values.items()}
    return {name: value.flatten(0, 1) for name, value in values.items()}


def _unwindowed(model: PreTrainedModel, grids: Tensor) -> Tensor:
    """Qwen2.5-VL: `[patches]` index that puts values from window order back into merge-group raster order."""
    vision = model.config.vision_config
    merge = vision.spatial_merge_size
    window = vision.window_size // merge // vision.patch_size
    order, start = [], 0
    for frames, height, width in grids.tolist():
        height, width = height // merge, width // merge
        places = [
            (t, r // window, c // window, r, c) for t in range(frames) for r in range(height) for c in range(width)
        ]
        order += [start + (t * height + r) * width + c for t, _, _, r, c in sorted(places)]
        start += len(places)
    groups = torch.tensor(order).argsort()
    return (groups[:, None] * merge**2 + torch.arange(merge**2)).flatten()


def _patch_statistics(
    model: PreTrainedModel, family_name: str, inputs: Inputs, modality: Modality
) -> tuple[dict[str, dict[int, Tensor]], Tensor]:
    """Per statistic and layer `[patches, ...]` over all items from eager maps, and the features `[patches, width]`."""
    twin = copy.deepcopy(model)
    layers = {module: layer for layer, module in enumerate(_attention_modules(twin.base_model.get_encoder("image")))}
    source = sys.modules[type(next(iter(layers))).__module__]
    eager = source.eager_attention_forward
    calls: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    features: list[Tensor] = []

    def recording(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        output, maps = eager(module, query, key, *args, **kwargs)
        if module in layers:
            has_cls = family_name in _CLS_FAMILIES
            for name, value in _call_statistics(query, key, maps, module.head_dim**-0.5, has_cls).items():
                calls[name, layers[module]].append(value)
        return output, maps

    def keep_features(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        # InternVL's projector sees shuffled patches, so its features are read where they leave the encoder.
        before = output.last_hidden_state[:, 1:] if family_name == "internvl" else args[0]
        features.append(before.reshape(-1, before.shape[-1]))

    tapped = twin.base_model.vision_tower if family_name == "internvl" else _projector(twin.base_model)
    tapped.register_forward_hook(keep_features)
    with mock.patch.object(source, "eager_attention_forward", recording), attention_implementation(twin, "eager"):
        _encode(twin, inputs, modality)

    statistics: dict[str, dict[int, Tensor]] = defaultdict(dict)
    back = _unwindowed(model, inputs[f"{modality}_grid_thw"]) if family_name == "qwen2_5_vl" else slice(None)
    for (name, layer), values in calls.items():
        statistics[name][layer] = torch.cat(values)[back]
    return dict(statistics), torch.cat(features)[back]


# --- public oracle


@torch.no_grad()
def reference_items(model: PreTrainedModel, family_name: str, inputs: Inputs) -> list[ReferenceItem]:
    """One item per image with all its tiles, or clip, in row-major order; `model` must not be wrapped."""
    ids, rows = inputs["input_ids"], _prompt(model, family_name, inputs)
    items = []
    for modality in _MEDIA:
        if _encode(model, inputs, modality) is None:
            continue
        statistics, features = _patch_statistics(model, family_name, inputs, modality)
        layouts = _layouts(model, family_name, inputs, modality)
        places = (ids == _token_id(model, modality)).nonzero().split([len(layout.align) for layout in layouts])
        first = 0
        for layout, place in zip(layouts, places, strict=True):
            newline = layout.align.isnan().any(-1)
            align = layout.align[~newline]
            patches = slice(first, first := first + align.shape[1])
            row, columns = int(place[0, 0]), place[:, 1]
            assert (place[:, 0] == row).all(), "an item lies in one row"
            text = inputs["attention_mask"][row].bool() & ~rows[row].visual
            item = VisualItem(
                embeddings=rows[row].embeddings[columns[~newline]],
                grids=layout.grids,
                tiles=layout.tiles,
                modality=modality,
                crops=layout.crops,
                features=align @ features[patches],
                text=rows[row].embeddings[text],
                **{
                    name: {layer: torch.tensordot(align, value[patches], 1) for layer, value in by_layer.items()}
                    for name, by_layer in statistics.items()
                },
            )
            items.append(ReferenceItem(row, columns[~newline], columns[newline], item, align))
    return sorted(items, key=lambda item: (item.row, int(item.positions[0])))


def encoder_facts(model: PreTrainedModel, family_name: str) -> EncoderFacts:
    """The facts of the model's encoder, from its config alone."""
    vision = model.config.vision_config
    depth = vision.depth if family_name in _QWEN_FAMILIES else vision.num_hidden_layers
    chosen = getattr(model.config, "vision_feature_layer", -1)
    used = chosen + depth + 1 if chosen < 0 else chosen
    full = vision.fullatt_block_indexes if family_name == "qwen2_5_vl" else range(depth)
    statistics = ("cls_rows", "cls_logits", "cls_rows_full_width")
    missing = {} if family_name in _CLS_FAMILIES else dict.fromkeys(statistics, "the encoder has no CLS token")
    reason = "" if family_name in _TOKENWISE_FAMILIES else "the projector mixes patches"
    return EncoderFacts(depth, used, tuple(layer for layer in full if layer < used), missing, reason)


def _merged(
    model: PreTrainedModel, inputs: Inputs, items: Sequence[ReferenceItem], selections: Sequence[Selection]
) -> list[Tensor]:
    """Per item the tokens that the projector makes of merged features, `[kept, dim]`; differentiable."""
    given: list[Tensor] = []
    projector = _projector(model.base_model)
    hook = projector.register_forward_pre_hook(lambda module, args: given.append(args[0].flatten(0, 1)))
    _encode(model, inputs, "image")
    hook.remove()
    patches = torch.cat(given).split([item.align.shape[1] for item in items])
    return [
        projector(selection.apply(item.align @ own))
        for item, own, selection in zip(items, patches, selections, strict=True)
    ]


def _compressed(
    model: PreTrainedModel,
    family_name: str,
    inputs: Inputs,
    items: Sequence[ReferenceItem],
    selections: Sequence[Selection],
    positions: Positions,
    space: Space,
    newlines: bool,
) -> list[tuple[_Row, Tensor]]:
    """Per row the sequence that is left, and `[length]` the padded column each token stands for (its slot)."""
    answer = []
    merged = _merged(model, inputs, items, selections) if space == "pre_projector" else [None] * len(items)
    for number, row in enumerate(_prompt(model, family_name, inputs)):
        triples = zip(items, selections, merged, strict=True)
        own = [triple for triple in triples if triple[0].row == number]
        length = len(row.embeddings)
        embeddings, ids = row.embeddings.clone(), row.positions.clone()
        levels = None if row.deepstack is None else [level.clone() for level in row.deepstack]
        kept = inputs["attention_mask"][number].bool().clone()
        for reference, selection, tokens in own:
            slots = reference.positions[selection.anchor.sort().values]
            kept[reference.positions] = False
            kept[reference.separators] = newlines
            kept[slots] = True
            embeddings[slots] = selection.apply(row.embeddings[reference.positions]) if tokens is None else tokens
            ids[..., slots] = row.positions[..., reference.positions[selection.anchor]]
            for level, original in zip(levels or (), row.deepstack or (), strict=True):
                level[slots] = selection.apply(original[reference.positions])
        columns = torch.arange(length)[kept]
        ids, following = ids[..., columns], row.following
        if positions == "renumber":
            ids, following = torch.arange(len(columns)).expand_as(ids), len(columns)
        deepstack = None if levels is None else tuple(level[columns] for level in levels)
        answer.append((_Row(embeddings[columns], ids, row.visual[columns], deepstack, following), columns))
    return answer


def _row_logits(model: PreTrainedModel, row: _Row, tokens: Sequence[int]) -> Tensor:
    """`[length + tokens, vocabulary]` logits of a row continued by forced `tokens`, in one pass."""
    added = torch.arange(row.following, row.following + len(tokens)).expand(*row.positions.shape[:-1], -1)
    positions = torch.cat([row.positions, added], -1)
    continuation = model.get_input_embeddings()(torch.tensor(tokens, dtype=torch.long))
    embeddings = torch.cat([row.embeddings, continuation])
    extra: dict[str, Any] = {}
    if row.deepstack is not None:
        extra["visual_pos_masks"] = functional.pad(row.visual, (0, len(tokens)))[None]
        extra["deepstack_visual_embeds"] = [level[row.visual] for level in row.deepstack]
    hidden = model.base_model.get_decoder()(
        inputs_embeds=embeddings[None],
        # Without a mask, gaps in the positions would be taken for packed sequences.
        attention_mask=torch.ones(1, len(embeddings), dtype=torch.long),
        position_ids=positions[..., None, :],
        use_cache=False,
        **extra,
    ).last_hidden_state
    return model.get_output_embeddings()(hidden)[0]


@dataclass(frozen=True)
class Entering:
    """A row as it enters the LLM, nothing padded; `candidate` `[tokens]` tells what may go there."""

    row: _Row
    candidate: Tensor


def whole_prompts(model: PreTrainedModel, name: str, inputs: Inputs) -> list[Entering]:
    """Every row as the plain model sees it."""
    every = [Selection.everything(len(item.positions)) for item in reference_items(model, name, inputs)]
    return prompts(model, name, inputs, every, "original", "projected")


@torch.no_grad()
def prompts(
    model: PreTrainedModel,
    name: str,
    inputs: Inputs,
    selections: Sequence[Selection],
    positions: Positions,
    space: Space,
) -> list[Entering]:
    """Every row with what `selections` leave of its items."""
    items = reference_items(model, name, inputs)
    rows = _compressed(model, name, inputs, items, selections, positions, space, True)
    visual = [torch.zeros(inputs["input_ids"].shape[1], dtype=torch.bool) for _ in rows]
    for item in items:
        visual[item.row][item.positions] = True
    return [Entering(row, mask[columns]) for mask, (row, columns) in zip(visual, rows, strict=True)]


@torch.no_grad()
def recompute(
    model: PreTrainedModel,
    family_name: str,
    inputs: Inputs,
    items: Sequence[ReferenceItem],
    selections: Sequence[Selection],
    positions: Positions,
    steps: int,
    space: Space = "projected",
    newlines: bool = True,
) -> Recomputed:
    """Greedy decoding of every row by itself, each step from scratch; never ends early, as under `min_new_tokens`."""
    tokens, logits = [], []
    for row, _ in _compressed(model, family_name, inputs, items, selections, positions, space, newlines):
        chosen: list[int] = []
        steps_logits = []
        for _ in range(steps):
            steps_logits.append(_row_logits(model, row, chosen)[-1])
            candidates = steps_logits[-1].clone()
            candidates[model.generation_config.eos_token_id] = -torch.inf
            chosen.append(int(candidates.argmax()))
        tokens.append(chosen)
        logits.append(torch.stack(steps_logits))
    return Recomputed(tokens, torch.stack(logits))


@torch.no_grad()
def forced_logits(
    model: PreTrainedModel,
    family_name: str,
    inputs: Inputs,
    items: Sequence[ReferenceItem],
    selections: Sequence[Selection],
    positions: Positions,
    row: int,
    tokens: Sequence[int],
    space: Space = "projected",
    newlines: bool = True,
) -> Tensor:
    """`[tokens + 1, vocabulary]`: the logits after the prompt of `row` and after each forced token."""
    prompt, _ = _compressed(model, family_name, inputs, items, selections, positions, space, newlines)[row]
    return _row_logits(model, prompt, tokens)[len(prompt.embeddings) - 1 :]


def score(
    model: PreTrainedModel,
    family_name: str,
    inputs: Inputs,
    items: Sequence[ReferenceItem],
    selections: Sequence[Selection],
    positions: Positions,
    row: int,
    tokens: Sequence[int],
) -> float:
    """The sum of the log-probabilities of forced `tokens` after the prompt of `row`."""
    logits = forced_logits(model, family_name, inputs, items, selections, positions, row, tokens)
    return float(logits[:-1].log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)].sum())


def loss(
    model: PreTrainedModel,
    family_name: str,
    inputs: Inputs,
    items: Sequence[ReferenceItem],
    selections: Sequence[Selection],
    positions: Positions,
    labels: Tensor,
    row: int | None = None,
    space: Space = "projected",
    newlines: bool = True,
) -> Tensor:
    """Mean cross-entropy of `labels` `[rows, length]`, of one row or over all labels of the batch; differentiable.

    Each kept token predicts the kept token after it; labels of -100 do not count.
    """
    losses = []
    compressed = _compressed(model, family_name, inputs, items, selections, positions, space, newlines)
    for number, (prompt, columns) in enumerate(compressed):
        if row is None or number == row:
            logits = _row_logits(model, prompt, ())
            losses.append(functional.cross_entropy(logits[:-1], labels[number, columns[1:]], reduction="none"))
    counted = (labels if row is None else labels[row : row + 1]) != -100
    # The first token of a row is predicted by none, so its label does not count.
    first = inputs["attention_mask"].argmax(-1)
    counted[torch.arange(len(counted)), first if row is None else first[row : row + 1]] = False
    return torch.cat(losses).sum() / counted.sum()
