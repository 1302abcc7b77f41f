"""How each kind of golden case is recomputed: one table from stem prefix to method and handler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmcompress.budget import Budget
from mmcompress.registry import METHODS
from mmcompress.types import EncoderFacts, Needs, VisualItem

if TYPE_CHECKING:
    from parity.cases import Case


@dataclass(frozen=True)
class Kept:
    """Selected `indices` `[kept]` with the `scores` `[tokens]` that ranked them: near-ties may fall either way."""

    indices: Tensor
    scores: Tensor


Outputs = Mapping[str, Tensor | Kept]


@dataclass(frozen=True)
class Handler:
    """What recomputes the outputs of a kind of case.

    Args:
        method: registry name, or what is checked where it is no method.
        run: case -> outputs by tensor name.
        options: options of the method that all cases share, `compat` among them.
        unchecked: outputs that are not compared, each with the reason.
    """

    method: str
    run: Callable[[Case], Outputs]
    options: Mapping[str, Any] = field(default_factory=dict)
    unchecked: Mapping[str, str] = field(default_factory=dict)


def vtc_cls(case: Case) -> Outputs:
    """Scores, kept indices and the tokens gathered by them."""
    params, attention, features = case.params, case.inputs["in_cls_attn"], case.inputs["in_patch_features"][0]
    reductions = (params["layer_reduction"], params["head_reduction"])
    assert reductions == ("sum", "mean"), f"no option reduces layers and heads by {reductions}"
    tokens = attention.shape[-1]
    item = VisualItem(
        embeddings=features,
        grids=((1, tokens),),
        tiles=torch.zeros(tokens, dtype=torch.long),
        cls_rows={layer: rows.T for layer, rows in enumerate(attention)},
    )
    used = params["end_layer_exclusive"]
    method = METHODS.build("vtc-cls", {**case.handler.options, "first_layer": params["start_layer"]})
    needs = method.needs(EncoderFacts(params["num_layers"], used, tuple(range(used))))
    selection = method.compress([item], Budget(params["token_num"]), needs)[0]
    scores = method.scores(item, needs)
    return {
        "out_score": scores,
        "out_keep_indices": Kept(selection.anchor, scores),
        "out_tokens": selection.apply(features)[None],
    }


def todre(case: Case) -> Outputs:
    """The order of choice and the kept indices."""
    tokens, thumbnail = case.inputs["in_tokens"], case.inputs["in_thumbnail_cls_attn"]
    crops = len(tokens) - case.params["thumbnail_tokens"]
    loudest = thumbnail.max() + 1  # crops never give the pivot, whatever their attention
    item = VisualItem(
        embeddings=tokens,
        grids=((1, len(tokens)),),
        tiles=torch.tensor([0] * len(thumbnail) + [1] * crops),
        cls_rows={0: torch.cat([thumbnail, loudest.expand(crops)])[:, None]},
    )
    method = METHODS.build("todre", case.handler.options)
    needs = method.needs(EncoderFacts(1, 1, (0,)))
    budget = case.params["k"]
    return {
        "out_selection_order": method.selection_order(item, budget, needs),
        "out_keep_indices": method.compress([item], Budget(budget), needs)[0].anchor,
    }


def capture_clip(case: Case) -> Outputs:
    """The statistics of a CLIP encoder, tapped while it runs on SDPA."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from mmcompress.integrations.hf.taps import FEATURES, Taps

    model = CLIPVisionModel._from_config(
        CLIPVisionConfig.from_dict(dict(case.params["config"])), attn_implementation="sdpa"
    ).eval()
    tower = getattr(model, "vision_model", model)
    prefix = "in_w."
    tower.load_state_dict(
        {name.removeprefix(prefix): value for name, value in case.inputs.items() if name.startswith(prefix)}
    )
    blocks = list(tower.encoder.layers)
    layers, last, before = tuple(range(len(blocks))), len(blocks) - 1, len(blocks) - 2
    needs = Needs(
        cls_rows=layers,
        cls_logits=(last,),
        cls_rows_full_width=(last,),
        received_attention=layers,
        keys=(last,),
        key_metric=(before,),
        features=True,
    )
    taps = Taps([block.self_attn for block in blocks], blocks[before], needs)
    with taps.collect() as captured, torch.no_grad():
        model(case.inputs["in_pixel_values"])
    taps.remove()
    values = {key: torch.cat(chunks) for key, chunks in captured.items()}
    cls_rows = torch.stack([values["cls_rows", layer] for layer in layers])
    received = torch.stack([values["received_attention", layer] for layer in layers])
    return {
        "out_cls_attn_per_layer": cls_rows[:, :, 1:].transpose(2, 3),
        "out_received_attn_per_layer": received[:, :, 1:],
        "out_last_layer_presoftmax_cls_logits_headmean": values["cls_logits", last][:, 1:],
        "out_last_layer_fullwidth_cls_attn": values["cls_rows_full_width", last][:, 1:],
        "out_penultimate_key_metric": values["key_metric", before],
        "out_hidden_penultimate": values[FEATURES],
        "out_last_layer_keys": values["keys", last],
    }


_SECOND_STAGE = "belongs to the stage inside the LLM, which is not part of this method"

HANDLERS: dict[str, Handler] = {
    "vtc_cls_": Handler("vtc-cls", vtc_cls),
    "todre_": Handler("todre", todre, unchecked={"out_alpha_t2v": _SECOND_STAGE, "out_alpha_v2t": _SECOND_STAGE}),
    "capture_clip_": Handler("capture-clip", capture_clip),
}
