"""Methods that merge tokens at the encoder's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from parity.handlers.base import Handler, Outputs
from torch import Tensor

from mmcompress.budget import Budget
from mmcompress.methods.aim import halving_steps
from mmcompress.registry import METHODS
from mmcompress.statistics import cls_rows_full_width
from mmcompress.types import EncoderFacts, Modality, Needs, Selection, VisualItem

if TYPE_CHECKING:
    from parity.cases import Case

ENCODER = EncoderFacts(1, 1, (0,))


def item_of(features: Sequence[Tensor], modality: Modality = "image", **statistics: Sequence[Tensor]) -> VisualItem:
    """An item of tiles with `features` `[tokens, width]` each, and statistics of one layer; tokens tile by tile."""
    sizes = torch.tensor([len(tile) for tile in features])
    together = torch.cat(list(features))
    return VisualItem(
        embeddings=together,
        grids=tuple((1, len(tile)) for tile in features),
        tiles=torch.arange(len(sizes)).repeat_interleave(sizes),
        modality=modality,
        features=together,
        **{name: {0: torch.cat(list(tiles))} for name, tiles in statistics.items()},
    )


def compress(method: Any, item: VisualItem, budget: int) -> Selection:
    """The method's selection, its outputs in the authors' order."""
    needs: Needs = method.needs(ENCODER)
    selection = method.compress([item], Budget(budget), needs)[0]
    order = method.merge(item, budget, needs).anchor
    rows = torch.searchsorted(selection.anchor, order)
    return Selection(selection.anchor[rows], selection.weight[rows])


def visionzip(case: Case) -> Outputs:
    """Dominant indices and all tokens per tile; for tiled images also the crops as the authors stitch them.

    The CLS token of a tile goes through as it is; it is none of the tokens that methods see.
    """
    params: Mapping[str, Any] = case.params
    dominant, contextual = params["dominant_internal"], params["contextual"]
    assert params["dominant_user"] == dominant + 1, "the CLS token is the one dominant token that is no patch"
    hidden, tiles = case.inputs["in_hidden_states"], len(case.inputs["in_hidden_states"])
    item = item_of(
        hidden[:, 1:],
        cls_rows=case.inputs["in_cls_attn_with_cls"][:, :, 1:].transpose(1, 2),
        key_metric=case.inputs["in_key_metric"][:, 1:],
    )
    kept, patches = dominant + contextual, hidden.shape[1] - 1
    method = METHODS.build("visionzip", {"contextual": contextual / kept, **case.handler.options})
    budget, needs = Budget(tiles * kept), method.needs(ENCODER)
    selection = method.compress([item], budget, needs)[0]
    anchors = selection.anchor.unflatten(0, (tiles, kept))[:, :dominant]
    ranked = item.cls_rows[0].sum(dim=-1)[anchors].argsort(dim=1, descending=True)
    outputs = {
        "out_tokens": torch.cat([hidden[:, :1], selection.apply(item.embeddings).unflatten(0, (tiles, kept))], dim=1),
        "out_all_indices": torch.nn.functional.pad(anchors.gather(1, ranked) % patches + 1, (1, 0)),
    }
    if "grid_wh" in params:
        image = _stitched(item, *params["grid_wh"])
        tokens = method.compress([image], budget, needs)[0].apply(image.embeddings)
        thumbnail, stitched, others = tokens.split([kept, (tiles - 1) * dominant, (tiles - 1) * contextual])
        torch.testing.assert_close(thumbnail, outputs["out_tokens"][0, 1:])
        outputs["out_next_crops"] = torch.cat([stitched, hidden[1:, 0], others])
    return outputs


def _stitched(item: VisualItem, columns: int, rows: int) -> VisualItem:
    """The tiles of `item` as a thumbnail and the plane that its crops form, as an LLM gets them."""
    tokens = len(item) // (1 + rows * columns)
    side = int(tokens**0.5)
    crops = torch.arange(rows * columns * tokens).view(rows, columns, side, side)
    order = torch.cat([torch.arange(tokens), tokens + crops.transpose(1, 2).flatten()])
    return VisualItem(
        embeddings=item.embeddings[order],
        grids=((side, side), (rows * side, columns * side)),
        tiles=item.tiles[order],
        crops=(rows, columns),
        features=item.embeddings[order],
        cls_rows={0: item.cls_rows[0][order]},
        key_metric={0: item.key_metric[0][order]},
    )


def prumerge(case: Case) -> Outputs:
    """The CLS row and the merged tokens, every image by itself."""
    params, features = case.params, case.inputs["in_patch_features"]
    tokens = params["num_patches"]
    assert params["adaptive"] and params["reduction_ratio"] is None, "only the adaptive count is known"
    keys = case.inputs["in_k"]
    rows = cls_rows_full_width(case.inputs["in_q"][:, None], keys[:, None], keys.shape[-1] ** -0.5)[:, 1:]
    method = METHODS.build(case.handler.method, {**case.handler.options, "neighbours": params["cluster_k"]})
    needs = method.needs(ENCODER)
    merged = []
    for image in range(len(features)):
        item = item_of(
            features[image : image + 1], cls_rows_full_width=rows[image : image + 1], keys=keys[image : image + 1, 1:]
        )
        selection = method.merge(item, tokens, needs)
        if len(selection) < tokens:  # an item that its budget does not reduce is never shown to a method
            selection = method.compress([item], Budget(tokens - 1), needs)[0]
        merged.append(selection.apply(item.embeddings))
    return {"out_cls_attn": rows, "out_tokens": torch.stack(merged)}


def aim_merge(case: Case) -> Outputs:
    """Tokens, and keys where these are the metric, after every step."""
    features, steps = case.inputs["in_x"], list[int]()
    batch, tokens = features.shape[:2]
    for count in case.params["r_per_step"]:
        steps.append(min(count, (tokens - sum(steps)) // 2))
    keys = case.inputs.get("in_key_metric", features)
    method = METHODS.build("aim", {"space": "pre_projector" if "in_key_metric" in case.inputs else "projected"})
    outputs: dict[str, Tensor] = {}
    start, taken = (features, keys), 0
    for number in range(len(steps)):
        if halving_steps(tokens, tokens - sum(steps[: number + 1])) == steps[: number + 1]:
            start, taken = (features, keys), 0  # steps as the method takes them: all in one go
        removed = sum(steps[taken : number + 1])
        item = item_of(start[0], modality="video", keys=start[1])
        selection = compress(method, item, len(item) - batch * removed)
        x, key = (selection.apply(values.flatten(0, 1)).unflatten(0, (batch, -1)) for values in start)
        outputs |= {f"out_x_{number}": x, f"out_key_{number}": key}
        start, taken = (x, key), number + 1
    return outputs


_OFFICIAL = {"compat": "official"}

HANDLERS = {
    "visionzip_": Handler("visionzip", visionzip, _OFFICIAL),
    "prumerge_": Handler("prumerge", prumerge, _OFFICIAL),
    "prumerge_plus_": Handler("prumerge-plus", prumerge, _OFFICIAL),
    "aim_merge_": Handler("aim", aim_merge),
}
