"""Methods that keep tokens unlike one another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from parity.handlers.base import Handler, Outputs

from mmcompress.budget import Budget
from mmcompress.registry import METHODS
from mmcompress.types import EncoderFacts, VisualItem

if TYPE_CHECKING:
    from parity.cases import Case


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
        "out_selection_order": method.selection_orders([item], [budget], needs)[0],
        "out_keep_indices": method.compress([item], Budget(budget), needs)[0].anchor,
    }


_SECOND_STAGE = "belongs to the stage inside the LLM, which is not part of this method"

HANDLERS = {
    "todre_": Handler("todre", todre, unchecked={"out_alpha_t2v": _SECOND_STAGE, "out_alpha_v2t": _SECOND_STAGE}),
}
