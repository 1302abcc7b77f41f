"""Policies that read a part of the KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from parity.handlers.base import Handler, Kept, Outputs
from torch import Tensor

from mmcompress.llm_method import LLMFacts
from mmcompress.registry import POLICIES
from mmcompress.sparse_reader import Entries, Reading, Step

if TYPE_CHECKING:
    from parity.cases import Case


def quest(case: Case) -> Outputs:
    """Bounds of all pages, what they bound, and the entries that the last token reads."""
    policy = _policy(case, {"page": case.params["page"]})
    key = case.inputs["k"]
    entries = Entries(torch.ones(key.shape[0], key.shape[2], dtype=torch.bool))
    pages = policy.summarise(None, key, entries)
    step = Step(case.inputs["q"][:, :, -1], key, entries, [case.params["token_budget"]] * len(key), pages)
    masks = {
        name: _mask(policy.choose(step), key.shape[2])[:, :, None] for name in case.outputs if "official_mask" in name
    }
    return {
        "page_min_kvhead": pages.low,
        "page_max_kvhead": pages.high,
        "page_upper_bound": policy.bounds(step).flatten(1, 2),
        **masks,
    }


def tidaldecode(case: Case) -> Outputs:
    """What every layer reads, and what comes of it."""
    params = case.params
    chosen = [params["sparse_layer_start"], params["correction_layer"]]
    policy = _policy(case, {"selection_layers": chosen})
    outputs: dict[str, Tensor | Kept] = {}
    heads = len(case.inputs["q_0"])
    reading = None
    for layer, duty in enumerate(policy.duties(LLMFacts(params["layers"], heads))):
        query, key, value = (case.inputs[f"{name}_{layer}"][None] for name in "qkv")
        entries = Entries(torch.ones(1, key.shape[2], dtype=torch.bool))
        everything = Reading(entries.column[:, None].expand(-1, key.shape[1], -1), entries.valid[:, None])
        if duty.chooses:
            reading = policy.choose(Step(query, key, entries, [params["top_k"]]))
        read = everything if duty.reads_all else reading
        assert read is not None
        outputs[f"out_{layer}"] = read.attend(query, key, value, key.shape[3] ** -0.5)[0]
        if reading is not None:
            outputs[f"mask_{layer}"] = _mask(reading, key.shape[2])[0]
    return outputs


def _policy(case: Case, options: dict[str, Any]) -> Any:
    return POLICIES.build(case.handler.method, {**case.handler.options, **options})


def _mask(reading: Reading, columns: int) -> Tensor:
    """`[batch, heads, columns]`, one where something is read."""
    mask = torch.zeros(*reading.columns.shape[:2], columns, dtype=torch.uint8)
    return mask.scatter_add(2, reading.columns, reading.valid.to(mask.dtype))


HANDLERS = {
    "quest_": Handler(
        "quest",
        quest,
        {"compat": "official"},
        {"factory_tokens_*": "KVCache-Factory's reading of Quest, which always reads the 16 most recent tokens"},
        inputs=("q", "k", "v"),
    ),
    "tidaldecode_": Handler("tidaldecode", tidaldecode, {"compat": "official"}, inputs=("q_*", "k_*", "v_*")),
}
