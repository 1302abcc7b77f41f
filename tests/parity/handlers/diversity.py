"""Methods that keep tokens unlike one another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from parity.handlers.base import Handler, Outputs
from torch import Tensor

from mmcompress.budget import Budget
from mmcompress.llm_method import PromptRow, RowAttention
from mmcompress.registry import METHODS
from mmcompress.types import EncoderFacts, VisualItem

if TYPE_CHECKING:
    from parity.cases import Case


def todre(case: Case) -> Outputs:
    """The order of choice and the kept indices; how much of its attention the question gives to the image."""
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
        "out_selection_order": method.selection_orders([item], [budget], needs)[0],
        "out_keep_indices": method.compress([item], Budget(budget), needs)[0].anchor,
        **({"out_alpha_t2v": _attention_to_image(case)} if "in_q" in case.inputs else {}),
    }


def _attention_to_image(case: Case) -> Tensor:
    query, key, params = case.inputs["in_q"][0], case.inputs["in_k"][0], case.params
    visual = torch.zeros(key.shape[1], dtype=torch.bool)
    visual[params["sys_len"] : params["sys_len"] + params["vis_len"]] = True
    assert len(visual) == params["sys_len"] + params["vis_len"] + params["text_len"]
    row = PromptRow(
        layer=28,
        total=params["vis_len"],
        visual=visual,
        text=~visual,
        hidden=key[0],
        source=torch.arange(len(visual)),
        previous=RowAttention(query, key, key.shape[-1] ** -0.5),
    )
    method = METHODS.build("todre-stage2", {"threshold": params["tau"]})
    return method.attention_to_image(row)


HANDLERS = {
    "todre_": Handler(
        "todre",
        todre,
        unchecked={"out_alpha_v2t": "no image attends to the text behind it, so that this is 0 and never decides"},
    ),
}
