"""Policies and methods that a draft model helps."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from parity.handlers.base import Handler, Kept, Outputs

from mmcompress import ops
from mmcompress.kv_policy import Ahead, KVRow
from mmcompress.methods.specpc import SpecPC
from mmcompress.registry import METHODS, POLICIES

if TYPE_CHECKING:
    from parity.cases import Case


def speckv(case: Case) -> Outputs:
    """Scores and kept entries, as long as the draft is held and afterwards, when the last token is to be read again."""
    params, prompt = case.params, case.params["prompt"]
    query, key, value = (case.inputs[name][0] for name in "qkv")
    before, ahead = slice(0, prompt), slice(prompt, prompt + params["lookahead"])
    place = torch.arange(prompt).expand(len(key), -1)
    row = KVRow(
        layer=0,
        layers=1,
        key=key[:, before],
        value=value[:, before],
        place=place,
        visual=torch.zeros_like(place, dtype=torch.bool),
        seen=prompt,
        scaling=key.shape[2] ** -0.5,
        ahead=Ahead(query[:, ahead], key[:, ahead]),
    )
    outputs: dict[str, torch.Tensor | Kept] = {}
    for reduction in ("max", "mean"):
        policy = POLICIES.build(
            "speckv", {"window": params["window"], "kernel": params["kernel"], "reduction": reduction}
        )
        row = replace(row, query=query[:, prompt - policy.needs().queries : prompt])
        scores = policy.score(row)[:, : prompt - policy.least]
        kept = policy.select(row, params["capacity"] + 1)
        window = 2.0 + torch.arange(params["eff_window"]).expand(len(scores), -1)  # above all, and no two alike
        everywhere = torch.cat([scores, window], dim=1)
        with_draft = [torch.cat([entries, torch.arange(ahead.start, ahead.stop)]) for entries in kept]
        outputs |= {
            f"score_{reduction}": scores[None],
            f"vertical_idx_{reduction}": scores.topk(params["vertical"]).indices[None],
            f"kept_before_crop_{reduction}": Kept(with_draft, everywhere),
            f"kept_after_crop_{reduction}": Kept([entries[:-1] for entries in kept], everywhere),
        }
    return outputs


def specpc(case: Case) -> Outputs:
    """Scores by the window's attention in the draft's layers, and the tokens of a prompt of text that stay."""
    params = case.params
    assert (params["pool"], params["reduction"]) == ("max", "max") and "linspace(0,1" in params["weighted_query"]
    method: SpecPC = METHODS.build(
        "specpc", {"window": params["window"], "kernel": params["kernel"], "neighbours": params["neighbor"]}
    )
    layers = []
    for layer in range(params["starting_layer"], params["layers"]):
        query, key = case.inputs[f"q_window_{layer}"], case.inputs[f"k_{layer}"]
        last_seen = torch.arange(key.shape[2] - query.shape[2], key.shape[2])
        layers.append(method.observe(ops.attention_rows(query, key, query.shape[3] ** -0.5, last_seen)[0]))
    scores = torch.stack(layers).amax(dim=0)
    return {"score": scores[None], "selected": _prompt(method, scores, params["cap"])[None]}


def specpc_settings(case: Case) -> Outputs:
    """The same with several settings, one of which lets the draft say a few tokens and observes these too."""
    query, key = case.inputs["q"], case.inputs["k"]
    outputs = {}
    for run in case.sidecar["runs"]:
        config = run["config"]
        kernel = config["kernel_size"] if config["pool_type"] else 1
        options = {"window": config["window_size"], "kernel": kernel, "neighbours": max(1, config["neighbor_tokens"])}
        method: SpecPC = METHODS.build("specpc", options)
        first, tokens = config["starting_layer_index"], key.shape[3]
        last_seen = torch.arange(tokens - method.window, tokens)
        rows = [
            ops.attention_rows(asked[:, :, -method.window :], keys, asked.shape[3] ** -0.5, last_seen)[0]
            for asked, keys in zip(query[first:], key[first:], strict=True)
        ]
        scores = [method.observe(of_layer) for of_layer in rows]
        for said in case.inputs["decode_attn"][: config["lookahead_tokens"] - 1]:
            scores += [of_layer[0, :, 0, :tokens].amax(dim=0) for of_layer in said[first:]]
        highest = torch.stack(scores).amax(dim=0)
        outputs |= {
            f"{run['name']}.score": highest[None],
            f"{run['name']}.keep": _prompt(method, highest, config["max_capacity_prompt"])[None],
        }
    return outputs


def _prompt(method: SpecPC, scores: torch.Tensor, capacity: int) -> torch.Tensor:
    """What stays of a prompt of text: its window, and so many others."""
    window = torch.arange(len(scores) - method.window, len(scores))
    others = [token for token in method.ranked(scores, capacity).tolist() if token < window[0]]
    return torch.cat([torch.tensor(others[: capacity - len(window)]).sort().values, window])


HANDLERS = {
    "speckv_": Handler("speckv", speckv, inputs=("q", "k", "v")),
    "specpc_": Handler("specpc", specpc, inputs=("q_window_*", "k_*")),
    "specpc": Handler(
        "specpc",
        specpc_settings,
        inputs=("q", "k", "decode_attn"),
        unchecked={
            "mean_*": "what a token gets is the highest attention here, as in the paper's experiments",
            "*_unweighted.*": "later queries of the window weigh more here, as in the paper's experiments",
            "avgpool.keep": "neighbouring scores are pooled by the highest here, as in the paper's experiments",
        },
    ),
}
