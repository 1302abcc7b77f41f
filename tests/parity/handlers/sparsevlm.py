"""SparseVLM: one of its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from parity.handlers.base import Handler, Outputs
from torch import Tensor

from mmcompress.llm_method import PromptRow, RowAttention
from mmcompress.registry import METHODS

if TYPE_CHECKING:
    from parity.cases import Case

AFTER_LAYERS = (2, 6, 15)
ROPE_THETA = 10000.0


def sparsevlm(case: Case) -> Outputs:
    """Raters within the question, scores, kept tokens, and the prompt that enters the next layer."""
    params, hidden = case.params, case.inputs["in_layer_output"][0]
    assert "removed" in params.get("noise", "removed")
    start, tokens = params["system_len"], params["image_len"]
    stop = start + tokens
    assert len(hidden) == stop + params["text_len"]
    places = torch.arange(len(hidden))
    ids = case.inputs.get("in_position_ids", places[None])[0]
    visual = (places >= start) & (places < stop)
    query = case.inputs["in_q"][0]
    row = PromptRow(
        layer=params["layer_idx"] + 1,
        total=tokens,
        visual=visual,
        text=~visual,
        hidden=hidden,
        source=places,
        previous=RowAttention(query, case.inputs["in_k"][0], params["logit_scale"]),
        inputs=case.inputs["in_input_embeds"][0],
        rotary=_rotary(ids, query.shape[-1]),
    )
    method = METHODS.build("sparsevlm", case.handler.options)
    left = min(params["keep_list"][AFTER_LAYERS.index(params["layer_idx"])], tokens - 1)
    selection = method.reduce(row, left)
    kept = torch.cat([places[:start], start + selection.anchor, places[stop:]])
    return {
        "out_rater_idx": method.raters(row) - stop,
        "out_visual_scores": method.scores(row)[None],
        "out_visual_mask": torch.zeros(1, tokens, dtype=torch.bool).index_fill(1, selection.anchor[:left], True),
        "out_hidden": torch.cat([hidden[:start], selection.apply(hidden[start:stop]), hidden[stop:]])[None],
        "out_position_ids": (ids[: len(kept)] if method.positions == "renumber" else ids[kept])[None],
    }


def _rotary(ids: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    angles = ids[:, None] * ROPE_THETA ** -(torch.arange(0, dim, 2) / dim)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


HANDLERS = {
    "sparsevlm_": Handler("sparsevlm", sparsevlm),
    "sparsevlm_v2_": Handler("sparsevlm", sparsevlm, {"version": "2.0"}, tolerance=1e-3),
}
