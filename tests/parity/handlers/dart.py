"""Pivots inside the LLM, and the tokens least like them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from parity.handlers.base import Handler, Outputs

from mmcompress.llm_method import PromptRow, RowAttention
from mmcompress.registry import METHODS

if TYPE_CHECKING:
    from parity.cases import Case


def dart(case: Case) -> Outputs:
    """Pivots of both kinds, and places in the prompt of the kept visual tokens."""
    params, order = case.params, case.expected["out_pivot_visit_order"]
    keys, normed = case.inputs["in_keys"][0], case.inputs["in_hidden_normed"][0]
    start, images, left = params["system_len"], params["image_len"], params["expected_total"]
    assert left == params["pivot_image_token"] + params["per_pivot_topk"] * len(order)
    assert len(normed) == start + images + params["text_len"]
    visual = torch.zeros(len(normed), dtype=torch.bool)
    visual[start : start + images] = True
    row = PromptRow(
        layer=2,
        total=images,
        visual=visual,
        text=~visual,
        hidden=normed,
        source=torch.arange(len(normed)),
        previous=RowAttention(keys, keys, 1.0),
        normed=normed,
    )
    options = {"image_pivots": params["pivot_image_token"], "text_pivots": params["pivot_text_token"]}
    method: Any = METHODS.build("dart", options)
    pivots = method.pivots(row, left)
    assert torch.equal(pivots.sort().values, order.sort().values)
    image_pivots, text_pivots = pivots.split(list(options.values()))
    return {
        "out_image_pivots": image_pivots,
        "out_text_pivots": text_pivots,
        "out_keep_indices": row.images[method.least_duplicated(row, order, left).anchor],
    }


HANDLERS = {
    "dart_": Handler(
        "dart",
        dart,
        unchecked={"out_pivot_visit_order": "the order of a hash table in the published code; taken as given"},
    )
}
