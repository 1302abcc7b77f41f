"""The statistics of an encoder that methods read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from parity.handlers.base import Handler, Outputs

from mmcompress.types import Needs

if TYPE_CHECKING:
    from parity.cases import Case


def capture_clip(case: Case) -> Outputs:
    """The statistics of a CLIP encoder, tapped while it runs on SDPA."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from mmcompress.integrations.hf.taps import FEATURES, Taps

    model = CLIPVisionModel._from_config(
        CLIPVisionConfig.from_dict(dict(case.params["config"])), attn_implementation="sdpa"
    ).eval()
    tower = getattr(model, "vision_model", model)
    prefix = "in_w."
    tower.load_state_dict(
        {name.removeprefix(prefix): value for name, value in case.inputs.items() if name.startswith(prefix)}
    )
    blocks = list(tower.encoder.layers)
    layers, last, before = tuple(range(len(blocks))), len(blocks) - 1, len(blocks) - 2
    needs = Needs(
        cls_rows=layers,
        cls_logits=(last,),
        cls_rows_full_width=(last,),
        received_attention=layers,
        keys=(last,),
        key_metric=(before,),
        features=True,
    )
    taps = Taps([block.self_attn for block in blocks], blocks[before], needs)
    with taps.collect() as captured, torch.no_grad():
        model(case.inputs["in_pixel_values"])
    taps.remove()
    values = {key: torch.cat(chunks) for key, chunks in captured.items()}
    cls_rows = torch.stack([values["cls_rows", layer] for layer in layers])
    received = torch.stack([values["received_attention", layer] for layer in layers])
    return {
        "out_cls_attn_per_layer": cls_rows[:, :, 1:].transpose(2, 3),
        "out_received_attn_per_layer": received[:, :, 1:],
        "out_last_layer_presoftmax_cls_logits_headmean": values["cls_logits", last][:, 1:],
        "out_last_layer_fullwidth_cls_attn": values["cls_rows_full_width", last][:, 1:],
        "out_penultimate_key_metric": values["key_metric", before],
        "out_hidden_penultimate": values[FEATURES],
        "out_last_layer_keys": values["keys", last],
    }


HANDLERS = {"capture_clip_": Handler("capture-clip", capture_clip)}
