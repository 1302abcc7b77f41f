"""Removals inside the language model, each checked by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from parity.handlers.base import Handler, Outputs
from torch import Tensor
from torch.nn.functional import pad
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mmcompress.compact import renumber
from mmcompress.llm_method import LLMFacts, LLMMethod, PromptRow, RowAttention
from mmcompress.registry import METHODS

if TYPE_CHECKING:
    from parity.cases import Case


@dataclass(frozen=True)
class Prompts:
    """Equal prompts: text, an image, text.

    Args:
        hidden: `[batch, tokens, width]`.
        image: columns of the image.
        layer: the layer about to run.
        total: tokens of the image at first.
    """

    hidden: Tensor
    image: slice
    layer: int
    total: int

    def kept(self, method: LLMMethod, left: int, statistics: Sequence[Mapping[str, Any]]) -> Tensor:
        """Columns `[batch, kept]` that stay, given what the method reads of every row."""
        kept = []
        for hidden, read in zip(self.hidden, statistics, strict=True):
            visual = torch.zeros(len(hidden), dtype=torch.bool)
            visual[self.image] = True
            source = torch.arange(len(hidden))
            row = PromptRow(self.layer, self.total, visual, ~visual, hidden, source, **read)
            chosen = source[self.image][method.reduce(row, left).anchor]
            kept.append(torch.cat([source[: self.image.start], chosen, source[self.image.stop :]]))
        return torch.stack(kept)

    def left(self, kept: Tensor) -> Tensor:
        """Their hidden states."""
        return self.hidden[torch.arange(len(kept))[:, None], kept]


def fastv(case: Case) -> Outputs:
    """The removal by the last token's attention in the layer before."""
    params, key = case.params, case.inputs["in_k"]
    image = slice(params["system_len"], params["system_len"] + params["image_len"])
    assert params["keep"] == round(params["image_len"] * (1 - params["fastv_r"]))
    prompts = Prompts(case.inputs["in_hidden"], image, 2, params["image_len"])
    query = pad(case.inputs["in_q_last"], (0, 0, key.shape[2] - 1, 0))
    attention = RowAttention(query[0], key[0], params["logit_scale"])
    rows = attention.rows(torch.tensor([key.shape[2] - 1]))[:, 0]
    torch.testing.assert_close(rows, case.inputs["in_last_query_attn"], rtol=2e-5, atol=1e-7)
    method = METHODS.build("fastv", {**case.handler.options, "layer": 2})
    assert method.positions == "original"
    kept = prompts.kept(method, params["keep"], [{"previous": attention}])
    return {"out_keep_indices": kept[0], "out_hidden": prompts.left(kept), "out_position_ids": kept}


def pyramiddrop(case: Case) -> Outputs:
    """One removal of several."""
    return _stage(case)[0]


def transprune(case: Case) -> Outputs:
    """One removal of several, and what is left of the transitions observed so far."""
    outputs, kept = _stage(case)
    return {**outputs, **{f"out_ttv_{number}": seen.gather(1, kept) for number, seen in enumerate(_observed(case))}}


def transitions(case: Case) -> Outputs:
    """What one layer does to every token."""
    method = METHODS.build("transprune", case.handler.options)
    attention = case.inputs["in_attn_in"][0], case.inputs["in_attn_out"][0]
    mlp = case.inputs["in_ffn_in"][0], case.inputs["in_ffn_out"][0]
    return {
        "out_ttv_attn": method.transition(*attention)[None],
        "out_ttv_ffn": method.transition(*mlp)[None],
        "out_ttv": method.observe(attention, mlp)[None],
    }


def _stage(case: Case) -> tuple[Outputs, Tensor]:
    """The removal that the case's stage begins with, and the columns `[batch, kept]` that stay."""
    params, hidden, ids = case.params, case.inputs["in_hidden"], case.inputs["in_position_ids"]
    image = slice(params["system_len"], params["system_len"] + params["image_tokens_now"])
    assert hidden.shape[1] == image.stop + params["text_len_after_image"]
    total, stage = params["image_tokens_original"], params["stage"]
    *lefts, last = official_counts(total, params["ratios"][1:])
    method = METHODS.build(case.handler.method, {**case.handler.options, "ratios": [left / total for left in lefts]})
    assert method.positions == "renumber"
    llm = LLMFacts(32, params["num_heads"])
    left = method.plan(total, last, last / total, llm)[stage]
    assert left == params["keep"]
    observed = _observed(case)
    statistics = [
        {
            "upcoming": upcoming,
            "observed": torch.stack([seen[row] for seen in observed]) if observed else None,
        }
        for row, upcoming in enumerate(_attentions(case))
    ]
    prompts = Prompts(hidden, image, method.layers(llm)[stage], total)
    kept = prompts.kept(method, left, statistics)
    valid = torch.ones_like(kept, dtype=torch.bool)
    outputs = {
        "out_keep_image_indices": kept[:, image.start : image.start + left] - image.start,
        "out_hidden": prompts.left(kept),
        "out_position_ids": renumber(ids, torch.ones_like(ids, dtype=torch.bool), kept, valid)[0],
    }
    return outputs, kept


def official_counts(total: int, ratios: Sequence[float]) -> list[int]:
    """What the published codes make of shares: to them 0.29 of 100 is 28."""
    return [int(total * ratio) for ratio in ratios]


def _attentions(case: Case) -> list[RowAttention]:
    """What passes through the attention of the layer to come, for every row."""
    params, hidden = case.params, case.inputs["in_hidden"]
    states = torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], case.inputs["in_ln_weight"], params["rms_eps"])
    dim = hidden.shape[-1] // params["num_heads"]
    query, key = (
        (states @ case.inputs[name].T).unflatten(-1, (-1, dim)).transpose(1, 2) for name in ("in_wq", "in_wk")
    )
    frequencies = params["rope_base"] ** (-torch.arange(0, dim, 2) / dim)
    angles = (case.inputs["in_position_ids"][..., None] * frequencies).repeat(1, 1, 2)
    query, key = apply_rotary_pos_emb(query, key, angles.cos(), angles.sin())
    return [RowAttention(*parts, dim**-0.5) for parts in zip(query, key, strict=True)]


def _observed(case: Case) -> list[Tensor]:
    """Transitions of the layers observed so far, `[batch, tokens]` each."""
    count = sum(name.startswith("in_ttv_") for name in case.inputs)
    return [case.inputs[f"in_ttv_{number}"] for number in range(count)]


HANDLERS = {
    "fastv_": Handler("fastv", fastv),
    "pdrop_": Handler("pyramiddrop", pyramiddrop),
    "transprune_": Handler("transprune", transprune),
    "transprune_ttv_": Handler("transprune", transitions),
}
