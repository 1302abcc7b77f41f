"""Token Transforming: every token goes into several of the tokens that stay, by how alike their keys are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from mmcompress.encoder_method import EncoderMethod, LayerTokens, Mixture, Step, constant_ratio_at
from mmcompress.errors import SpecError
from mmcompress.methods._attention import Score
from mmcompress.registry import register
from mmcompress.statistics import cls_rows, key_metric, received_attention
from mmcompress.types import EncoderFacts, Needs

_DEPTH, _LAYERS = 12, (3, 6, 9)


@register(
    "token-transforming",
    summary="Experimental: many-to-many merging, every token shared out over the most attended ones.",
    family="merging",
    stage="encoder",
    paper="Token Transforming: A Unified and Training-Free Token Compression Framework for Vision Transformer "
    "Acceleration, arXiv:2506.05709",
)
@dataclass(frozen=True)
class TokenTransforming(EncoderMethod):
    """A matrix of M rows over N tokens, in which a token may count in several rows, at the end of a few layers.

    That form is the paper's. What fills it is not, but chosen here: which tokens are anchors, how alike tokens are and
    the temperature of that, the layers (3, 6 and 9 of 12), and their rates (each keeps the same fraction).

    The M patches with the most attention in a layer become anchors. Patch j gives anchor i the part `W_ij` of itself,
    the softmax over anchors of `cos(k_i, k_j) / temperature`, with keys averaged over heads. An anchor becomes the
    mean of what it is given, weighted by the patches `m_j` that each token stands for, and stands for what it is given
    of them, `sum_j W_ij m_j`: their sum never changes. CLS stays as it is and gives and takes nothing.

    Args:
        temperature: how evenly a patch is shared out, above 0; near 0, each merges into its most similar anchor.
        score: "cls" reads the CLS token's row; "received" reads the attention a token receives from all tokens, for
            encoders without CLS. Either is averaged over heads.
    """

    temperature: float = 0.1
    score: Score = "cls"

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise SpecError(f"token-transforming: temperature={self.temperature} must be above 0.")

    def needs(self, encoder: EncoderFacts) -> Needs:
        """Attention and keys of the layers that transform."""
        layers = _layers(encoder)
        if self.score == "cls":
            return Needs(cls_rows=layers, key_metric=layers)
        return Needs(received_attention=layers, key_metric=layers)

    def schedule(self, tokens: int, keep: int, encoder: EncoderFacts) -> list[Step]:
        """A constant ratio over the layers that transform."""
        return [Step(left) for left in constant_ratio_at(_layers(encoder), tokens, keep, encoder)]

    def reduce(self, tokens: LayerTokens, step: Step) -> Mixture:
        """Share every patch out over the anchors, which stay in raster order."""
        assert tokens.attention is not None
        front = tokens.protected
        if self.score == "cls":
            attention = cls_rows(*tokens.attention).mean(dim=-1)
        else:
            attention = received_attention(*tokens.attention)
        ranked = attention[:, front:].argsort(dim=-1, descending=True, stable=True)
        anchors = ranked[:, : step.left].sort(dim=-1).values
        unit = normalize(key_metric(*tokens.attention)[:, front:], dim=-1)
        closeness = unit.take_along_dim(anchors[..., None], dim=1) @ unit.transpose(1, 2)
        given = (closeness / self.temperature).softmax(dim=1) * tokens.size[:, None, front:]
        mass = given.sum(dim=-1)
        first = torch.arange(front, device=anchors.device)
        weight = given.new_zeros(len(given), front + step.left, front + unit.shape[1])
        weight[:, first, first] = 1
        weight[:, front:, front:] = given / mass[..., None]
        kept = torch.cat([first.expand(len(anchors), -1), front + anchors], dim=1)
        return Mixture(kept, torch.cat([tokens.size[:, :front], mass], dim=1), weight)


def _layers(encoder: EncoderFacts) -> tuple[int, ...]:
    return encoder.scale_layers(_LAYERS, _DEPTH)
