"""Methods that rank tokens by the attention of CLS."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from parity.handlers.base import Handler, Kept, Outputs

from mmcompress.budget import Budget
from mmcompress.registry import METHODS
from mmcompress.types import EncoderFacts, VisualItem

if TYPE_CHECKING:
    from parity.cases import Case


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
        "out_keep_indices": Kept([selection.anchor], scores[None]),
        "out_tokens": selection.apply(features)[None],
    }


HANDLERS = {"vtc_cls_": Handler("vtc-cls", vtc_cls)}
