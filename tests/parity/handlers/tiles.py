"""Methods that know the tiles of an image, or the question about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from parity.handlers.base import Handler, Outputs
from torch import Tensor

from mmcompress.budget import Budget
from mmcompress.registry import METHODS
from mmcompress.types import EncoderFacts, VisualItem

if TYPE_CHECKING:
    from parity.cases import Case


@dataclass(frozen=True)
class Plane:
    """Square crops of `side` tokens stitched as `rows` x `columns`, in which the picture may leave padding.

    Args:
        rows: crops below one another.
        columns: crops beside one another.
        side: tokens along a side of a tile.
        size: (width, height) of the picture; None if there is no padding.
    """

    rows: int
    columns: int
    side: int
    size: tuple[int, int] | None = None

    def area(self) -> tuple[slice, slice]:
        """Rows and columns of the plane that the picture fills."""
        height, width = self.rows * self.side, self.columns * self.side
        if self.size is None:
            return slice(height), slice(width)
        if self.size[0] / self.size[1] > width / height:
            padding = (height - int(self.size[1] * width / self.size[0])) // 2
            return slice(padding, height - padding), slice(width)
        padding = (width - int(self.size[0] * height / self.size[1])) // 2
        return slice(height), slice(padding, width - padding)

    def tokens(self) -> Tensor:
        """`[rows, columns]` of the filled area: number of each token, counted tile by tile from the thumbnail on."""
        crops = torch.arange(self.rows * self.columns * self.side**2) + self.side**2
        stitched = crops.view(self.rows, self.columns, self.side, self.side).transpose(1, 2)
        return stitched.flatten(2, 3).flatten(0, 1)[self.area()]


def tiled_item(plane: Plane, features: Tensor, statistic: str, layers: Sequence[Tensor]) -> tuple[VisualItem, Tensor]:
    """An item of the thumbnail and the plane, with the number of each token.

    Args:
        plane: the crops.
        features: `[tiles, tokens, dim]`, the thumbnail first.
        statistic: what a method reads.
        layers: its values by layer, `[tiles, tokens, ...]`.
    """
    filled = plane.tokens()
    numbers = torch.cat([torch.arange(plane.side**2), filled.flatten()])
    values = {layer: value.flatten(0, 1)[numbers] for layer, value in enumerate(layers)}
    item = VisualItem(
        embeddings=features.flatten(0, 1)[numbers],
        grids=((plane.side, plane.side), (filled.shape[0], filled.shape[1])),
        tiles=numbers // plane.side**2,
        crops=(plane.rows, plane.columns),
        **{statistic: values},
    )
    return item, numbers


# --- hired


def hired_mask(case: Case, plane: Plane, first: Tensor, last: Tensor) -> Tensor:
    """What one image keeps, `[tiles, tokens]`, given attention `[tiles, heads, tokens]` of two layers."""
    layers = [first.transpose(1, 2), last.transpose(1, 2)]
    tiles, tokens = layers[0].shape[:2]
    assert (tiles, tokens) == (1 + plane.rows * plane.columns, plane.side**2)
    item, numbers = tiled_item(plane, torch.zeros(tiles, tokens, 1), "cls_rows", layers)
    method = METHODS.build("hired", {**case.handler.options, "alpha": case.params["alpha"]})
    budget = Budget(int(tiles * tokens * case.params["token_budget_rate"]))
    kept = method.compress([item], budget, method.needs(EncoderFacts(2, 2, (0, 1))))[0].anchor
    mask = torch.zeros(tiles * tokens, dtype=torch.bool)
    mask[numbers[kept]] = True
    return mask.view(tiles, tokens)


def hired(case: Case) -> Outputs:
    """The first code's allocation, and its packing without newlines."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    params, inputs = case.params, case.inputs
    assert params["head_reduction"] == "sum" and params["budget_mode"].startswith("count_top_(1-alpha)_raster_chunks")
    counts = inputs["in_num_partitions"].tolist()
    masks, packed = [], []
    for (height, width), first, last, features in zip(
        inputs["in_image_sizes_hw"].tolist(),
        *(inputs[name].split(counts) for name in ("in_cls_attn_first", "in_cls_attn_last", "in_features")),
        strict=True,
    ):
        # The authors' fork takes the rows of the grid for its columns.
        columns, rows = get_anyres_image_grid_shape((height, width), params["grid_pinpoints_hw"], params["crop"])
        masks.append(hired_mask(case, Plane(rows, columns, params["side"]), first, last))
        area = Plane(rows, columns, params["side"], (width, height)).tokens()
        order = torch.cat([torch.arange(params["side"] ** 2), area.flatten()])
        packed.append(features.flatten(0, 1)[order[masks[-1].flatten()[order]]])
    mask = torch.cat(masks)
    return {
        "out_mask": mask,
        "out_budgets": mask.sum(dim=1),
        "out_packed": torch.cat(packed),
        "out_packed_lens": torch.tensor([len(tokens) for tokens in packed]),
    }


def hired_paper(case: Case) -> Outputs:
    """The paper's allocation, every crop full."""
    first, last = case.inputs["in_cls_attn_first"], case.inputs["in_cls_attn_last"]
    plane = Plane(case.params["grid_h"], case.params["grid_w"], math.isqrt(first.shape[-1]))
    mask = hired_mask(case, plane, first, last)
    return {"out_mask": mask, "out_budgets": mask.sum(dim=1)}


# --- globalcom2


@dataclass(frozen=True)
class Commanded:
    """What GlobalCom2 keeps at the case's ratio.

    Args:
        plane: the crops.
        item: the image without padding.
        thumbnail: kept indices of its thumbnail.
        crops: kept indices of its crops.
        scales: retention of every crop.
    """

    plane: Plane
    item: VisualItem
    thumbnail: Tensor
    crops: Tensor
    scales: Tensor

    @classmethod
    def of(cls, case: Case) -> Commanded:
        """The budget is what the counts at the case's ratio, rounded down, add up to."""
        params = case.params
        plane = Plane(params["grid_h"], params["grid_w"], params["side"], tuple(params["original_size_wh"]))
        item, _ = tiled_item(plane, case.inputs["in_features"], "cls_logits", [case.inputs["in_cls_logits"]])
        method = METHODS.build("globalcom2", {**case.handler.options, "temperature": params["temperature"]})
        needs = method.needs(EncoderFacts(1, 1, (0,)))
        scales = (params["retention_ratio"] * method.densities(item, needs)).clamp(max=1)
        budget = int((torch.bincount(item.tiles, minlength=len(scales)) * scales).long().sum())
        kept = method.compress([item], Budget(budget), needs)[0].anchor
        in_thumbnail = item.tiles[kept] == 0
        return cls(plane, item, kept[in_thumbnail], kept[~in_thumbnail], scales[1:])

    def lines(self, rows: Tensor, count: int, newline: Tensor) -> Tensor:
        """The crops' tokens, the i-th of them in row `rows[i]` of `count`, with a newline after every row."""
        assert (rows.diff() >= 0).all(), "tokens come row by row"
        lines = self.item.embeddings[self.crops].split(torch.bincount(rows, minlength=count).tolist())
        return torch.cat([part for line in lines for part in (line, newline[None])])


def globalcom2(case: Case) -> Outputs:
    """The official order, and its packing: a newline after every row of the padded plane."""
    kept = Commanded.of(case)
    side = kept.plane.side
    crop = kept.item.tiles[kept.crops]
    number = (kept.item.tiles[None] == crop[:, None]).cumsum(dim=1).gather(1, kept.crops[:, None])[:, 0] - 1
    rows = (crop - 1) // kept.plane.columns * side + number // side
    thumbnail = kept.item.embeddings[kept.thumbnail]
    crops = kept.lines(rows, kept.plane.rows * side, case.inputs["in_newline"])
    return {
        "out_thumb_indices": kept.thumbnail,
        "out_thumb_tokens": thumbnail,
        "out_crop_scales": kept.scales,
        "out_crop_tokens": crops,
        "out_final": torch.cat([thumbnail, crops]),
    }


def globalcom2_fixed(case: Case) -> Outputs:
    """Tokens at their true places, and a newline after every row that holds some of the picture."""
    kept = Commanded.of(case)
    rows, columns = kept.item.grids[1]
    place = kept.crops - kept.plane.side**2
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    mask[place] = True
    grid = torch.zeros(kept.plane.rows * kept.plane.side, kept.plane.columns * kept.plane.side, dtype=torch.bool)
    grid[kept.plane.area()] = mask.view(rows, columns)
    crops = kept.lines(place // columns, rows, case.inputs["in_newline"])
    return {
        "out_thumb_indices": kept.thumbnail,
        "out_crop_scales": kept.scales,
        "out_keep_grid": grid,
        "out_final": torch.cat([kept.item.embeddings[kept.thumbnail], crops]),
    }


# --- cdpruner


def cdpruner(case: Case) -> Outputs:
    """The masks of a batch, from projected tokens and the CLIP embeddings of patches and text."""
    from mmcompress.integrations.hf.text_tower import cosines

    projected, texts = case.inputs["in_projected"], case.inputs["in_text_embeds"]
    tokens = projected.shape[1]
    items = [
        VisualItem(
            embeddings=embeddings,
            grids=((1, tokens),),
            tiles=torch.zeros(tokens, dtype=torch.long),
            relevance=cosines(texts, patches),
        )
        for embeddings, patches in zip(projected, case.inputs["in_image_embeds"], strict=True)
    ]
    method = METHODS.build("cdpruner", {**case.handler.options, "text_tower": "its embeddings are given"})
    needs = method.needs(EncoderFacts(1, 1, (0,)))
    mask = torch.zeros(projected.shape[:2], dtype=torch.bool)
    for row, selection in zip(
        mask, method.compress(items, Budget(case.params["visual_token_num"]), needs), strict=True
    ):
        row[selection.anchor] = True
    return {"out_mask": mask}


_OFFICIAL = {"compat": "official"}

HANDLERS = {
    "hired_": Handler("hired", hired, {"allocation": "stripes", **_OFFICIAL}),
    "hired_paper_": Handler("hired", hired_paper, _OFFICIAL),
    "globalcom2_": Handler("globalcom2", globalcom2, _OFFICIAL),
    "globalcom2_fixed_": Handler("globalcom2", globalcom2_fixed),
    "cdpruner_": Handler("cdpruner", cdpruner, _OFFICIAL),
}
