"""One attention score per token, read in the last layer that shapes what the LLM sees."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mmcompress.types import EncoderFacts, Needs, VisualItem

Score = Literal["cls", "received"]


def attention_needs(score: Score, encoder: EncoderFacts) -> Needs:
    """The CLS row of the last used layer, or what tokens receive in the last layer that attends to the whole image."""
    if score == "cls":
        return Needs(cls_rows=(encoder.used - 1,))
    return Needs(received_attention=encoder.global_layers[-1:])


def attention(item: VisualItem, needs: Needs) -> Tensor:
    """Attention per token, averaged over heads, `[tokens]` in float32."""
    if needs.cls_rows:
        return item.cls_rows[needs.cls_rows[-1]].float().mean(dim=-1)
    return item.received_attention[needs.received_attention[-1]].float()
