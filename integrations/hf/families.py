"""What differs between model families: token ids, the vision encoder's anatomy, and how patches become LLM tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmcompress.errors import UnsupportedError
from mmcompress.integrations.hf.dialled import DialledProjector
from mmcompress.statistics import NEEDS_CLS
from mmcompress.types import EncoderFacts, Modality, Positions

Grid = tuple[int, int]
STATISTICS = ("cls_rows", "cls_logits", "cls_rows_full_width", "received_attention", "keys", "key_metric")
ENCODERS: dict[Modality, str] = {"image": "get_image_features", "video": "get_video_features"}


@dataclass(frozen=True)
class Layout:
    """Where an item's tokens come from.

    Args:
        separator: `[placeholders]` bool; newline tokens, which are never candidates.
        grids: `(rows, columns)` per plane of the other tokens, in sequence order.
        tiles: `[candidates]` encoder tile of each candidate, 0 for the thumbnail.
        crops: `(rows, columns)` of the crops stitched into the second plane; None if there is no such plane.
    """

    separator: Tensor
    grids: tuple[Grid, ...]
    tiles: Tensor
    crops: Grid | None = None

    @classmethod
    def of_planes(cls, grids: Sequence[Grid], device: torch.device) -> Layout:
        """An item without separators, one tile per plane."""
        sizes = torch.tensor([rows * columns for rows, columns in grids], device=device)
        tiles = torch.arange(len(grids), device=device).repeat_interleave(sizes)
        return cls(torch.zeros(len(tiles), dtype=torch.bool, device=device), tuple(grids), tiles)


class Family(ABC):
    """Facts about one model family; `base` is the model without its head."""

    joins_runs = False
    """Whether an item is one unbroken run of placeholders (its tiles are encoded as if they were images)."""

    positions: Positions = "renumber"
    """How kept tokens are numbered unless the user says otherwise."""

    no_pre_projector = "its projector joins several patches into one token"
    """Why features cannot be merged before the projector; empty where it maps each token by itself."""

    no_encoder_stage = "its layers or its projector need the whole grid of patches"
    """Why tokens cannot be removed between encoder layers; empty where these and the projector take any number."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self.config = base.config

    @property
    def token_ids(self) -> dict[Modality, int]:
        """Placeholder token id of each modality the family has."""
        modalities: tuple[Modality, ...] = ("image", "video")
        return {
            modality: getattr(self.config, f"{modality}_token_id")
            for modality in modalities
            if hasattr(self.base, ENCODERS[modality])
        }

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The vision encoder's layers."""

    @property
    def attentions(self) -> list[nn.Module]:
        """The attention module of every vision layer."""
        return [cast(nn.Module, block.self_attn) for block in self.blocks]

    @property
    def feature_source(self) -> nn.Module:
        """The module whose output goes to the projector."""
        return self.blocks[self.used_layers - 1]

    @property
    def projector(self) -> nn.Module | None:
        """The projector, where it maps each token by itself."""
        return None

    has_cls = False

    @property
    def used_layers(self) -> int:
        """How many encoder layers shape the features."""
        return len(self.blocks)

    @property
    def global_layers(self) -> tuple[int, ...]:
        """Layers in which every patch attends to the whole image."""
        return tuple(range(self.used_layers))

    @property
    def patches(self) -> int:
        """Patches of an encoder tile where all tiles have equally many, else 0."""
        return 0

    def facts(self) -> EncoderFacts:
        """The encoder as methods see it."""
        reason = f"the vision encoder of {type(self.base).__name__} has no CLS token"
        missing = {} if self.has_cls else dict.fromkeys(NEEDS_CLS, reason)
        return EncoderFacts(
            depth=len(self.blocks),
            used=self.used_layers,
            global_layers=self.global_layers,
            missing=missing,
            no_pre_projector=self.no_pre_projector,
            no_encoder_stage=self.no_encoder_stage,
            patches=self.patches,
        )

    @abstractmethod
    def layouts(self, modality: Modality, rows: Tensor, call: Mapping[str, Any]) -> list[Layout]:
        """One layout per encoded item; `rows` `[placeholders, dim]` are all features, `call` names the arguments."""

    def parts(self, call: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The encoder call cut into calls for single items, where that is simple; else the call itself."""
        return [dict(call)]

    @abstractmethod
    def align(self, chunks: list[Tensor], modality: Modality, call: Mapping[str, Any]) -> Tensor:
        """Values per patch `[batch, tokens, channels]` -> per token `[placeholders, channels]`, NaN at separators."""


class _TiledEncoder(Family):
    """Encoders that see a batch of equal square tiles."""

    @property
    def blocks(self) -> list[nn.Module]:
        tower = self.base.get_encoder("image")
        return list(getattr(tower, "vision_model", tower).encoder.layers)

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile."""
        vision = self.config.vision_config
        return int(vision.image_size) // int(vision.patch_size)

    @property
    def patches(self) -> int:
        return self.patches_per_side**2

    def _patches(self, chunks: list[Tensor]) -> Tensor:
        """All tiles' values `[tiles, patches, channels]`, without the CLS token that comes first where there is one."""
        return torch.cat(chunks)[:, -self.patches :]


class Llava(_TiledEncoder):
    """LLaVA-1.5: one tile per image, one token per patch."""

    no_pre_projector = ""
    no_encoder_stage = ""

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        tower = self.config.vision_config.model_type
        strategy = self.config.vision_feature_select_strategy
        known = {"clip_vision_model": (True, "default"), "siglip_vision_model": (False, "full")}
        if tower not in known or known[tower][1] != strategy:
            raise UnsupportedError(
                f"{type(base).__name__} with vision tower {tower!r} and vision_feature_select_strategy={strategy!r} is "
                "not supported; CLIP with 'default' and SigLIP with 'full' are."
            )
        self.has_cls = known[tower][0]
        if not isinstance(self.config.vision_feature_layer, int):
            self.no_encoder_stage = "its projector joins the features of several encoder layers token by token"

    @property
    def used_layers(self) -> int:
        chosen = self.config.vision_feature_layer
        states = len(self.blocks) + 1
        return max(layer % states for layer in ([chosen] if isinstance(chosen, int) else chosen))

    @property
    def projector(self) -> nn.Module | None:
        return cast(nn.Module, self.base.multi_modal_projector)

    def parts(self, call: Mapping[str, Any]) -> list[dict[str, Any]]:
        by_image = [name for name in ("pixel_values", "image_sizes") if call.get(name) is not None]
        images = range(len(call["pixel_values"]))
        return [{**call, **{name: call[name][image : image + 1] for name in by_image}} for image in images]

    def layouts(self, modality: Modality, rows: Tensor, call: Mapping[str, Any]) -> list[Layout]:
        grid = (self.patches_per_side, self.patches_per_side)
        return [Layout.of_planes([grid], rows.device) for _ in range(len(rows) // (grid[0] * grid[1]))]

    def align(self, chunks: list[Tensor], modality: Modality, call: Mapping[str, Any]) -> Tensor:
        return self._patches(chunks).flatten(0, 1)


class DialledLlava(Llava):
    """A LLaVA whose projector is replaced by one with a dial: what it makes are no patches any more."""

    no_pre_projector = "its projector makes another number of tokens than there are patches"
    no_encoder_stage = "its projector needs the whole grid of patches"

    def facts(self) -> EncoderFacts:
        missing = dict.fromkeys(STATISTICS, self.no_pre_projector)
        return replace(super().facts(), missing=missing, patches=0)

    def layouts(self, modality: Modality, rows: Tensor, call: Mapping[str, Any]) -> list[Layout]:
        grid = self.base.multi_modal_projector.grid
        return [Layout.of_planes([grid], rows.device) for _ in range(len(rows) // (grid[0] * grid[1]))]

    def align(self, chunks: list[Tensor], modality: Modality, call: Mapping[str, Any]) -> Tensor:
        raise UnsupportedError(f"what a method reads of patches is of no use: {self.no_pre_projector}.")


class LlavaNext(Llava):
    """LLaVA-NeXT: a thumbnail and AnyRes crops, stitched, un-padded, a newline token after every row."""

    no_encoder_stage = "behind its projector, crops are stitched and padding is cut off, which takes their whole grids"

    def layouts(self, modality: Modality, rows: Tensor, call: Mapping[str, Any]) -> list[Layout]:
        side = self.patches_per_side
        packed = self._pack([self._coordinates(grid, rows.device) for grid in self._crop_grids(call)], call)
        layouts = []
        for crop_grid, values in zip(self._crop_grids(call), packed, strict=True):
            separator = values[:, 0].isnan()
            crops = values[side * side :]
            inside = crops[~crops[:, 0].isnan()]
            grids = [(side, side)]
            if len(inside):  # un-padding leaves nothing of very wide or tall images
                rows_left = len(crops) - len(inside)
                grids.append((rows_left, len(inside) // rows_left))
            crop = 1 + (inside[:, 0] // side) * crop_grid[1] + inside[:, 1] // side
            tiles = torch.cat([crop.new_zeros(side * side), crop]).long()
            layouts.append(Layout(separator, tuple(grids), tiles, crop_grid if len(inside) else None))
        return layouts

    def align(self, chunks: list[Tensor], modality: Modality, call: Mapping[str, Any]) -> Tensor:
        return torch.cat(self._pack(list(self._patches(chunks).split(self.tile_counts(call))), call))

    def tile_counts(self, call: Mapping[str, Any]) -> list[int]:
        """Tiles of each image, its thumbnail among them."""
        return [1 + rows * columns for rows, columns in self._crop_grids(call)]

    def _crop_grids(self, call: Mapping[str, Any]) -> list[Grid]:
        """Rows and columns of each image's crops; (0, 0) for an image that is only its thumbnail."""
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

        size = self.config.vision_config.image_size
        pinpoints = self.config.image_grid_pinpoints
        return [tuple(get_anyres_image_grid_shape(image, pinpoints, size)) for image in call["image_sizes"]]

    def _coordinates(self, crop_grid: Grid, device: torch.device) -> Tensor:
        """Row and column of each patch's centre in the stitched image `[tiles, patches, 2]`; zeros in the thumbnail."""
        side, (crop_rows, crop_columns) = self.patches_per_side, crop_grid
        row = torch.arange(crop_rows * side, device=device) + 0.5
        column = torch.arange(crop_columns * side, device=device) + 0.5
        stitched = torch.stack(torch.meshgrid(row, column, indexing="ij"), dim=-1)
        crops = stitched.view(crop_rows, side, crop_columns, side, 2).transpose(1, 2).reshape(-1, side * side, 2)
        return torch.cat([crops.new_zeros(1, side * side, 2), crops])

    def _pack(self, tiles: list[Tensor], call: Mapping[str, Any]) -> list[Tensor]:
        """The model's own packing, run on values instead of features."""
        newline = torch.full((tiles[0].shape[-1],), torch.nan, device=tiles[0].device)
        packed, _ = self._packer(call)(tiles, call["image_sizes"], image_newline=newline)
        return list(packed)

    def _packer(self, call: Mapping[str, Any]) -> Any:
        strategy = self.config.vision_feature_select_strategy
        return partial(self.base.pack_image_features, vision_feature_select_strategy=strategy)


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision: AnyRes with resized packing, several images one tile each, and video pooled 2x2."""

    no_pre_projector = "behind its projector, frames of a video are pooled and large images resized"

    def parts(self, call: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [dict(call)]  # whether an image is cropped depends on its neighbours

    def layouts(self, modality: Modality, rows: Tensor, call: Mapping[str, Any]) -> list[Layout]:
        if modality == "image":
            return super().layouts(modality, rows, call)
        videos, frames = _pixels(call).shape[:2]
        side = -(-self.patches_per_side // 2)
        clip = Layout.of_planes([(side, side)] * frames, rows.device)
        end = torch.ones(1, dtype=torch.bool, device=rows.device)
        return [Layout(torch.cat([clip.separator, end]), clip.grids, clip.tiles)] * videos

    def align(self, chunks: list[Tensor], modality: Modality, call: Mapping[str, Any]) -> Tensor:
        if modality == "image":
            return super().align(chunks, modality, call)
        pooled = self.base.apply_pooling(self._patches(chunks))
        clips = pooled.reshape(len(_pixels(call)), -1, pooled.shape[-1])
        return nn.functional.pad(clips, (0, 0, 0, 1), value=torch.nan).flatten(0, 1)

    def _crop_grids(self, call: Mapping[str, Any]) -> list[Grid]:
        per_row = call.get("batch_num_images")
        alone = [True] * len(call["image_sizes"]) if per_row is None else [n == 1 for n in per_row for _ in range(n)]
        return [grid if tiled else (0, 0) for grid, tiled in zip(super()._crop_grids(call), alone, strict=True)]

    def _packer(self, call: Mapping[str, Any]) -> Any:
        ratio = call.get("vision_aspect_ratio") or self.config.vision_aspect_ratio
        return partial(self.base.pack_image_features, vision_aspect_ratio=ratio)


def _pixels(call: Mapping[str, Any]) -> Tensor:
    # transformers 5.17 calls a video's pixels pixel_values.
    return call["pixel_values_videos"] if "pixel_values_videos" in call else call["pixel_values"]


class QwenVL(Family):
    """Qwen2-VL and Qwen3-VL: native resolution, 2x2 patch merger, frames merged in time, M-RoPE."""

    positions = "original"

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.base.visual.blocks)

    @property
    def attentions(self) -> list[nn.Module]:
        return [cast(nn.Module, block.attn) for block in self.blocks]

    @property
    def merge(self) -> int:
        """Side of the square of patches that forms one token."""
        return int(self.config.vision_config.spatial_merge_size)

    def layouts(self, modality: Modality, rows: Tensor, call: Mapping[str, Any]) -> list[Layout]:
        planes = [[(h // self.merge, w // self.merge)] * t for t, h, w in call[f"{modality}_grid_thw"].tolist()]
        return [Layout.of_planes(grids, rows.device) for grids in planes]

    def align(self, chunks: list[Tensor], modality: Modality, call: Mapping[str, Any]) -> Tensor:
        patches = torch.cat(chunks, dim=1)[0]
        return patches.view(-1, self.merge**2, patches.shape[-1]).mean(dim=1)


class Qwen25VL(QwenVL):
    """Qwen2.5-VL: as Qwen2-VL, with patches in window order and few layers of global attention."""

    @property
    def global_layers(self) -> tuple[int, ...]:
        return tuple(self.base.visual.fullatt_block_indexes)

    def align(self, chunks: list[Tensor], modality: Modality, call: Mapping[str, Any]) -> Tensor:
        from transformers.vision_utils import get_vision_window_index

        order = get_vision_window_index(
            call[f"{modality}_grid_thw"],
            spatial_merge_size=self.merge,
            window_size=self.base.visual.window_size,
            patch_size=self.config.vision_config.patch_size,
        )[0]
        return super().align(chunks, modality, call)[torch.argsort(order)]


class InternVL(_TiledEncoder):
    """InternVL: an image's tiles are encoded as if they were images, the thumbnail last; 2x2 pixel shuffle."""

    joins_runs = True
    has_cls = True

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.base.vision_tower.encoder.layer)

    @property
    def attentions(self) -> list[nn.Module]:
        return [cast(nn.Module, block.attention) for block in self.blocks]

    @property
    def used_layers(self) -> int:
        return int(self.config.vision_feature_layer) % (len(self.blocks) + 1)

    @property
    def patches_per_side(self) -> int:
        vision = self.config.vision_config
        return int(vision.image_size[0]) // int(vision.patch_size[0])

    def layouts(self, modality: Modality, rows: Tensor, call: Mapping[str, Any]) -> list[Layout]:
        side = int(self.patches_per_side * self.config.downsample_ratio)
        return [Layout.of_planes([(side, side)], rows.device) for _ in range(len(rows) // side**2)]

    def align(self, chunks: list[Tensor], modality: Modality, call: Mapping[str, Any]) -> Tensor:
        values = self._patches(chunks)
        side = self.patches_per_side
        maps = values.movedim(-1, 0).reshape(-1, side, side, 1)
        grouped = self.base.pixel_shuffle(maps, scale_factor=self.config.downsample_ratio).flatten(1, 2).mean(dim=-1)
        return grouped.view(values.shape[-1], -1).T


class SmolVLM(_TiledEncoder):
    """SmolVLM: every sub-image is an item of its own, since text tokens name each; pixel shuffle by `scale_factor`."""

    @property
    def feature_source(self) -> nn.Module:
        return cast(nn.Module, self.base.get_encoder("image").post_layernorm)

    def layouts(self, modality: Modality, rows: Tensor, call: Mapping[str, Any]) -> list[Layout]:
        side = self.patches_per_side // self.config.scale_factor
        return [Layout.of_planes([(side, side)], rows.device) for _ in range(len(rows) // side**2)]

    def align(self, chunks: list[Tensor], modality: Modality, call: Mapping[str, Any]) -> Tensor:
        values = self._patches(chunks)
        maps = values.movedim(-1, 0).flatten(0, 1)[..., None]
        grouped = self.base.connector.pixel_shuffle(maps, self.config.scale_factor).mean(dim=-1)
        return grouped.reshape(values.shape[-1], -1).T


FAMILIES: dict[str, type[Family]] = {
    "llava": Llava,
    "llava_next": LlavaNext,
    "llava_onevision": LlavaOnevision,
    "qwen2_vl": QwenVL,
    "qwen2_5_vl": Qwen25VL,
    "qwen3_vl": QwenVL,
    "internvl": InternVL,
    "smolvlm": SmolVLM,
}


def family_of(model: Any) -> Family:
    """The facts about `model`, whose type is one of `FAMILIES`."""
    if isinstance(getattr(model.base_model, "multi_modal_projector", None), DialledProjector):
        return DialledLlava(model.base_model)
    return FAMILIES[model.config.model_type](model.base_model)
