"""Methods that act between encoder layers, one step at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from parity.handlers.base import Handler, Outputs
from torch import Tensor

from mmcompress.encoder_method import Attention, LayerTokens, Step
from mmcompress.methods.pitome import energy
from mmcompress.registry import METHODS
from mmcompress.types import EncoderFacts

if TYPE_CHECKING:
    from parity.cases import Case

ENCODER = EncoderFacts(1, 1, (0,))


def layer_tokens(hidden: Tensor, size: Tensor, protected: int, attention: Attention) -> LayerTokens:
    """Tokens inside the first layer of an encoder."""
    return LayerTokens(ENCODER, 0, protected, hidden, size, attention)


def of_keys(metric: Tensor) -> Attention:
    """Attention whose keys, averaged over heads, are `metric` `[images, tokens, dim]`."""
    return Attention(metric[:, None], metric[:, None], 1.0)


def tome(case: Case) -> Outputs:
    """Tokens and sizes after every step."""
    hidden = case.inputs["in_x"]
    size, protected = hidden.new_ones(hidden.shape[:2]), int(case.params["class_token"])
    method: Any = METHODS.build("tome", {})
    outputs: dict[str, Tensor] = {}
    for number, wanted in enumerate(case.params["r_per_step"]):
        tokens = layer_tokens(hidden, size, protected, of_keys(case.inputs[f"in_metric_{number}"]))
        reduction = method.reduce(tokens, Step(tokens.count - min(wanted, tokens.count // 2)))
        hidden, size = reduction.apply(hidden), reduction.size
        outputs |= {f"out_x_{number}": hidden, f"out_size_{number}": size[..., None]}
    return outputs


def pitome(case: Case) -> Outputs:
    """Energy, tokens and sizes after one step."""
    params, metric = case.params, case.inputs["in_metric"]
    assert params["alpha"] == 1.0, "only exponential units of scale 1 are known"
    options = {
        "matching": {"default": "energy", "bsm": "places", "bsm_pitome": "interleaved"}[params["mode"]],
        "metric": "keys",
        "average": {"mean": "plain", "wavg": "size"}[params["aggregate"]],
        "margin": params["margin"],
    }
    method: Any = METHODS.build("pitome", options)
    protected, size = int(params["class_token"]), case.inputs["in_size"][..., 0]
    tokens = layer_tokens(case.inputs["in_x"], size, protected, of_keys(metric))
    reduction = method.reduce(tokens, Step(tokens.count - params["r"]))
    # Where tokens are matched by places, energy has no use and is given of CLS too.
    ranked = metric[:, -case.expected["out_energy"].shape[1] :]
    return {
        "out_energy": energy(ranked, params["margin"]),
        "out_x": reduction.apply(tokens.hidden),
        "out_size": reduction.size[..., None],
    }


def diffrate(case: Case) -> Outputs:
    """The order of all tokens, and tokens and sizes after one step."""
    params, hidden, size = case.params, case.inputs["in_x"], case.inputs["in_size"][..., 0]
    attention = case.inputs["in_cls_attn"]
    rows = torch.cat([1 - attention.sum(dim=-1, keepdim=True), attention], dim=-1)
    # One query of ones and keys of one dimension, so that this is the row that attention counting sizes gives.
    key = (rows / size[:, None]).log()[..., None]
    tokens = layer_tokens(hidden, size, 1, Attention(torch.ones_like(key), key, 1.0))
    method: Any = METHODS.build("diffrate", {})
    step = Step(params["merge_kept_num"] - 1, first=hidden.shape[1] - params["prune_kept_num"])
    reduction = method.reduce(tokens, step)
    return {
        "out_sort_index": method.ranking(tokens),
        "out_x": reduction.apply(hidden),
        "out_size": reduction.size[..., None],
    }


HANDLERS = {
    "tome_": Handler("tome", tome),
    "pitome_": Handler("pitome", pitome),
    "diffrate_": Handler("diffrate", diffrate),
}
