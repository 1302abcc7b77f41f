"""PageRank pruning inside the LLM as published: what is pruned is masked from the next layer on, and stays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from parity.handlers.base import Handler, Outputs
from parity.handlers.end_to_end import TOLERANCE, build
from torch import Tensor
from torch.nn.functional import pad

from mmcompress.integrations.hf.taps import tap
from mmcompress.llm_method import RowAttention
from mmcompress.methods.aim_pruning import importance
from mmcompress.ranking import top_indices

if TYPE_CHECKING:
    from parity.cases import Case


def still_visible(scores: Tensor, visible: Tensor, image: slice, rate: float) -> Tensor:
    """Mask `[tokens]` of the text and of the best of the visual tokens that are not masked: `rate` of all of them."""
    tokens = image.stop - image.start
    text = len(visible) - tokens
    candidates = scores[image].masked_fill(~visible[image], -1)
    mask = torch.ones_like(visible)
    mask[image] = False
    mask[image.start + top_indices(candidates, int(tokens * rate + text) - text)] = True
    return mask


def aim_prune(case: Case) -> Outputs:
    """Importance and mask after each of a few layers, one after the other."""
    params = case.params
    assert (params["tau"], params["iters"], params["d"]) == (0.1, 5, 0), "only this PageRank is known"
    image = slice(params["system_len"], params["system_len"] + params["image_len"])
    batch, _, length, dim = case.inputs["in_q_0"].shape
    assert length == image.stop + params["text_len"]
    scaling = dim**-0.5 * params["logit_extra_scale"]
    visible, outputs = torch.ones(batch, length, dtype=torch.bool), dict[str, Tensor]()
    for number, layer in enumerate(params["layers"]):
        queries, keys = case.inputs[f"in_q_{number}"], case.inputs[f"in_k_{number}"]
        scores = torch.stack(
            [
                importance(RowAttention(query, key, scaling), seen)
                for query, key, seen in zip(queries, keys, visible, strict=True)
            ]
        )
        rate = params["retain_rate"][layer]
        visible = torch.stack([still_visible(*row, image, rate) for row in zip(scores, visible, strict=True)])
        outputs |= {f"out_importance_{number}": scores, f"out_mask_{number}": visible}
    return outputs


@torch.no_grad()
def end_to_end(case: Case) -> Outputs:
    """Masks after every layer, and what the model makes of its prompt and tokens, all of them in one pass."""
    params = case.params
    prompt, steps = case.inputs["in_inputs_embeds"], params["decode_steps"]
    length, image = prompt.shape[1], slice(params["system_len"], params["system_len"] + params["image_len"])
    model: Any = build(case)
    decoder, seen = model.base_model.get_decoder(), dict[str, RowAttention]()

    def read(query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
        seen["last"] = RowAttention(query[0, :, :length], key[0, :, :length], kwargs["scaling"])

    hidden = torch.cat([prompt, decoder.embed_tokens(case.expected["out_tokens"][None, :steps])], dim=1)
    rotary = decoder.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    causal = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()
    visible, masks = torch.ones(length, dtype=torch.bool), []
    for layer, block in enumerate(decoder.layers):
        tap(block.self_attn, read)
        mask = causal & pad(visible, (0, steps), value=True)
        hidden = block(hidden, attention_mask=mask[None, None], position_embeddings=rotary)
        rate = min(1, max(0, 1 - (layer - params["l1"] + 1) * params["step"]))
        visible = still_visible(importance(seen["last"], visible), visible, image, rate)
        masks.append(visible)
    logits = model.get_output_embeddings()(decoder.norm(hidden[0, length - 1 :]))[:, : params["vocab"]]
    return {"out_logits": logits, "out_tokens": logits.argmax(dim=-1), "out_masks_after_layer": torch.stack(masks)}


HANDLERS = {
    "aim_prune_": Handler("aim", aim_prune),
    "e2e_aim": Handler("aim", end_to_end, tolerance=TOLERANCE),
}
