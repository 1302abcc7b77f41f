"""Prefill and decode of a tiny language model that loses visual tokens between its layers.

The case's language model runs in a stock InternVL, a tile of which is one token: an image may have any number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from parity.handlers.base import Handler, Outputs
from parity.handlers.in_llm import official_counts
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

import mmcompress
from mmcompress.llm_method import LLMFacts
from mmcompress.registry import METHODS

if TYPE_CHECKING:
    from parity.cases import Case


@dataclass(frozen=True)
class Answer:
    """What a model gave.

    Args:
        logits: `[1 + decode steps, vocabulary]`, from the prompt's last token on.
        lengths: `[layers]` tokens that each layer stored of the prompt.
    """

    logits: Tensor
    lengths: Tensor

    @property
    def outputs(self) -> Outputs:
        """Under the names of the cases."""
        return {
            "out_logits": self.logits,
            "out_tokens": self.logits.argmax(dim=-1),
            "out_kv_lengths": self.lengths,
        }


def build(case: Case) -> PreTrainedModel:
    """The model of a case; behind its vocabulary comes the placeholder, whose embedding is zero."""
    params = case.params
    settings: dict[str, Any] = dict(
        hidden_size=params["hidden"],
        intermediate_size=params["intermediate"],
        num_hidden_layers=params["layers_total"],
        num_attention_heads=params["heads"],
        num_key_value_heads=params.get("kv_heads", params["heads"]),
        vocab_size=params["vocab"] + 1,
        rms_norm_eps=params["rms_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": params["rope_base"]},
        max_position_embeddings=4096,
    )
    text = transformers.Qwen2Config if params.get("qkv_bias") else transformers.LlamaConfig
    tile = dict(image_size=[2, 2], patch_size=[1, 1], hidden_size=4, intermediate_size=4)
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(num_hidden_layers=1, num_attention_heads=1, **tile),
        text_config=text(**settings),
        image_token_id=params["vocab"],
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    model = transformers.InternVLForConditionalGeneration(config).eval()
    named = {name.removeprefix("in_w."): value for name, value in case.inputs.items() if name.startswith("in_w.")}
    named["embed_tokens.weight"] = pad(named["embed_tokens.weight"], (0, 0, 0, 1))
    model.base_model.get_decoder().load_state_dict(named)
    model.get_output_embeddings().weight.data = pad(case.inputs["in_lm_head"], (0, 0, 0, 1))
    return model


@torch.no_grad()
def answer(case: Case, keep: int, options: Mapping[str, Any]) -> Answer:
    """What the case's model makes of its prompt and tokens, compressed by the handler's method.

    Args:
        case: the case.
        keep: visual tokens left in the last layer.
        options: the method's options beside those of the handler.
    """
    params, prompt = case.params, case.inputs["in_inputs_embeds"].clone()
    image = slice(params["system_len"], params["system_len"] + params["image_len"])
    assert prompt.shape[1] == image.stop + params["text_len"]
    features = prompt[0, image, None].clone()
    prompt[:, image] = 0
    model: Any = build(case)
    model.base_model.multi_modal_projector.register_forward_hook(lambda *_: features)
    with mmcompress.wrap(model, case.handler.method, keep=keep, **case.handler.options, **options):
        output = model(inputs_embeds=prompt, pixel_values=torch.zeros(len(features), 3, 2, 2), use_cache=True)
        cache, logits = output.past_key_values, [output.logits[0, -1]]
        lengths = torch.tensor([layer.keys.shape[-2] for layer in cache.layers])
        for token in case.expected["out_tokens"][: params["decode_steps"]]:
            output = model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
            logits.append(output.logits[0, -1])
    return Answer(torch.stack(logits)[:, : params["vocab"]], lengths)


def fastv(case: Case) -> Outputs:
    """One removal by the attention of the layer before."""
    params = case.params
    keep = round(params["image_len"] * (1 - params["r"]))
    return answer(case, keep, {"layer": params["K"]}).outputs


def progressive(case: Case) -> Outputs:
    """Several removals."""
    params, total = case.params, case.params["image_len"]
    *lefts, last = official_counts(total, params["ratios"])
    options: dict[str, Any] = {
        "prune_layers": params["prune_after_layers_1based"],
        "ratios": [left / total for left in lefts],
    }
    method = METHODS.build(case.handler.method, options)
    observed = method.needs(LLMFacts(params["layers_total"], params["heads"])).transitions
    assert [layer + 1 for layer in observed] == params["accumulate_layers_1based"]
    return answer(case, last, options).outputs


TOLERANCE = "atol 1e-4"

HANDLERS = {
    "e2e_fastv_": Handler("fastv", fastv, tolerance=TOLERANCE),
    "e2e_pdrop_": Handler("pyramiddrop", progressive, tolerance=TOLERANCE),
    "e2e_transprune_": Handler("transprune", progressive, tolerance=TOLERANCE),
}
