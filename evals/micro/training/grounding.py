"""A small CLIP text tower, trained beside the encoder to find what a question is about."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mmcompress.evals.micro.training.vision import Metrics

_TEMPERATURE = 0.07


def ground(clip: Any, patches: Tensor, questions: Tensor, asked: Tensor, referred: Tensor) -> tuple[Tensor, Metrics]:
    """The loss of telling the patches a question is about from the others of its picture.

    The similarity of a patch and its question is made *low*, as it is in CLIP, whose patch features are known to be
    the less like a text the more they show of it; so methods written for CLIP read this tower the right way round.

    Args:
        clip: a CLIPModel, of which the text tower and both projections are used and trained.
        patches: hidden states of the layer the LLM reads [batch, patches, dim].
        questions: token ids [questions, tokens], each with an end-of-text token.
        asked: the picture of each question [questions].
        referred: which patches a question is about [questions, patches].
    """
    text = functional.normalize(clip.get_text_features(input_ids=questions).pooler_output.float(), dim=-1)
    seen = clip.visual_projection(clip.vision_model.post_layernorm(patches)).float()
    seen = functional.normalize(seen, dim=-1)[asked]
    similarity = torch.einsum("qd,qpd->qp", text, seen)
    target = referred / referred.sum(1, keepdim=True)
    loss = functional.cross_entropy(-similarity / _TEMPERATURE, target)
    found = referred.gather(1, similarity.argmin(1, keepdim=True))
    return loss, {"grounded": found.float().mean()}
