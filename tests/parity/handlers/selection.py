"""Methods that pick tokens of an image by encoder attention, diversity or both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from parity.handlers.base import Handler, Outputs
from torch import Tensor
from torch.nn.functional import pad

from mmcompress.budget import Budget
from mmcompress.method import VisualMethod
from mmcompress.registry import METHODS
from mmcompress.statistics import received_attention
from mmcompress.types import EncoderFacts, VisualItem

if TYPE_CHECKING:
    from parity.cases import Case

ENCODER = EncoderFacts(1, 1, (0,))
ENCODER_OF_TWO = EncoderFacts(2, 2, (0, 1))


def fastervlm(case: Case) -> Outputs:
    """Mask and tokens of a batch of images."""
    assert case.params["head_reduction"] == "mean"
    return _cls_guided(case, {})


def vispruner(case: Case) -> Outputs:
    """Mask and tokens of a batch of images."""
    params = case.params
    return _cls_guided(case, {"important_ratio": params["important_ratio"], "prune_per_step": params["prune_per_iter"]})


def _cls_guided(case: Case, options: Mapping[str, Any]) -> Outputs:
    features = case.inputs["in_features"]
    items = [
        _image(tokens, (1, len(tokens)), cls_rows={0: rows.T}, features=tokens)
        for tokens, rows in zip(features, case.inputs["in_cls_attn"], strict=True)
    ]
    kept = _kept(_method(case, options), ENCODER, items, case.params["visual_token_num"])
    return {
        "out_mask": torch.stack([_mask(anchor, len(item)) for anchor, item in zip(kept, items, strict=True)]),
        "out_tokens": torch.stack([tokens[anchor] for tokens, anchor in zip(features, kept, strict=True)]),
    }


def hiprune(case: Case) -> Outputs:
    """Masks of the tiles of one image; attention comes from the queries and keys of the two layers, CLS included."""
    params = case.params
    layers = [
        received_attention(query, key, params["attn_logit_scale_used"])[:, 1:]
        for query, key in zip(case.inputs["in_q_object_deep"], case.inputs["in_k_object_deep"], strict=True)
    ]
    for layer, stated in zip(layers, ("in_object_attn", "in_deep_attn"), strict=True):
        torch.testing.assert_close(layer, case.inputs[stated], rtol=2e-5, atol=1e-7)
    count, tokens = layers[0].shape
    grid = (tokens // params["width"], params["width"])
    assert grid[0] * grid[1] == tokens
    assert params["per_tile"] == params["retention_total"] // count
    image = VisualItem(
        embeddings=case.inputs["in_features"].flatten(0, 1),
        grids=(grid,) * count,
        tiles=torch.arange(count).repeat_interleave(tokens),
        received_attention={layer: values.flatten() for layer, values in enumerate(layers)},
    )
    kept = _kept(_method(case, _hiprune_options(case)), ENCODER_OF_TWO, [image], params["per_tile"] * count)[0]
    return {"out_mask": _mask(kept, len(image)).view(count, tokens)}


def hiprune_qwen(case: Case) -> Outputs:
    """Mask of one image of merged tokens, and the prompt around it."""
    params, prompt = case.params, case.inputs["in_inputs_embeds"][0]
    start, tokens = params["system_len"], params["image_tokens"]
    assert len(prompt) == start + tokens + params["text_len"]
    image = _image(
        prompt[start : start + tokens],
        tuple(params["grid_hw_merged"]),
        received_attention={0: case.inputs["in_object_attn"], 1: case.inputs["in_deep_attn"]},
    )
    budget = round(tokens * params["retain"])
    kept = _kept(_method(case, _hiprune_options(case)), ENCODER_OF_TWO, [image], budget)[0]
    columns = _prompt_columns(kept, start, tokens, len(prompt))
    return {
        "out_select_mask": _mask(kept, tokens),
        "out_inputs_embeds": prompt[columns][None],
        "out_position_ids": case.inputs["in_position_ids"][:, :, columns],
        "out_attention_mask": torch.ones(1, len(columns), dtype=torch.int64),
    }


def _hiprune_options(case: Case) -> dict[str, Any]:
    return {"alpha": case.params["alpha"], "object_layer": 0, "deep_layer": 1}


def holov(case: Case) -> Outputs:
    """Tokens of a batch of images in the order of the published code."""
    params, tokens = case.params, case.inputs["in_tokens"]
    assert (params["attn_scale"], params["esp"]) == (1000.0, 1e-6)
    options = {"chunks": params["num_patches"], "alpha": params["alpha"]}
    items = [
        _image(image, (1, len(image)), cls_rows={0: attention[:, None]})
        for image, attention in zip(tokens, case.inputs["in_cls_attn"], strict=True)
    ]
    kept = _kept(_method(case, options), ENCODER, items, params["k"])
    return {
        "out_tokens": torch.stack(
            [_padded(image[anchor], params["k"]) for image, anchor in zip(tokens, kept, strict=True)]
        )
    }


def holov_qwen(case: Case) -> Outputs:
    """Tokens and positions of one image, and the position ids of the prompt around it."""
    params, tokens = case.params, case.inputs["in_tokens"][0]
    image = _image(tokens, (1, len(tokens)), received_attention={0: case.inputs["in_attn"]})
    by_default = max(1, 16 * len(tokens) // (9 * params["k"]))
    options: dict[str, Any] = {"alpha": params["beta"], "score": "received"}
    if params["num_patches"] != by_default:
        options["chunks"] = params["num_patches"]
    kept = _kept(_method(case, options), ENCODER, [image], params["k"])[0]
    positions, start = case.inputs["in_position_ids"], params["system_len"]
    columns = _prompt_columns(kept, start, len(tokens), positions.shape[-1])
    return {
        "out_tokens": _padded(tokens[kept], params["k"])[None],
        "out_positions": pad(kept, (0, params["k"] - len(kept)), value=-1),
        "out_position_ids": positions[:, :, columns],
    }


def divprune(case: Case) -> Outputs:
    """The order of choice and the kept indices."""
    params, tokens = case.params, case.inputs["in_projected"]
    budget = params["k"]
    assert budget == round(params["subset_ratio"] * len(tokens))
    item, method = _image(tokens, (1, len(tokens))), METHODS.build("divprune", case.handler.options)
    return {
        "out_selection_order": method.selection_orders([item], [budget])[0],
        "out_keep_indices": _kept(method, ENCODER, [item], budget)[0],
    }


def _image(tokens: Tensor, grid: tuple[int, int], **statistics: Any) -> VisualItem:
    return VisualItem(embeddings=tokens, grids=(grid,), tiles=torch.zeros(len(tokens), dtype=torch.long), **statistics)


def _method(case: Case, options: Mapping[str, Any]) -> VisualMethod:
    method: VisualMethod = METHODS.build(case.handler.method, {**case.handler.options, **options})
    return method


def _kept(method: VisualMethod, encoder: EncoderFacts, items: list[VisualItem], budget: int) -> list[Tensor]:
    selections = method.compress(items, Budget(budget), method.needs(encoder))
    assert all(selection.weight is None for selection in selections)
    return [selection.anchor for selection in selections]


def _mask(kept: Tensor, tokens: int) -> Tensor:
    return torch.zeros(tokens, dtype=torch.bool).index_fill(0, kept, True)


def _padded(tokens: Tensor, count: int) -> Tensor:
    """The published code fills up with zeros what it leaves unfilled."""
    return pad(tokens, (0, 0, 0, count - len(tokens)))


def _prompt_columns(kept: Tensor, start: int, tokens: int, length: int) -> Tensor:
    """Columns of a prompt that stay, in order, where of the image's `tokens` from `start` on only `kept` do."""
    return torch.cat([torch.arange(start), start + kept, torch.arange(start + tokens, length)])


HANDLERS = {
    "fastervlm_": Handler("fastervlm", fastervlm),
    "vispruner_": Handler("vispruner", vispruner),
    "hiprune_": Handler("hiprune", hiprune),
    "hiprune_qwen_": Handler("hiprune", hiprune_qwen),
    "holov_": Handler("holov", holov, {"compat": "official"}),
    "holov_qwen_": Handler("holov", holov_qwen, {"compat": "official"}),
    "divprune_": Handler("divprune", divprune),
}
