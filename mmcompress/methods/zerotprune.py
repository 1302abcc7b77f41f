"""Zero-TPrune: prune what the attention graph ranks low, after what looks like something ranked higher."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmcompress import ops
from mmcompress.budget import left_by, require_ratios
from mmcompress.compact import take
from mmcompress.encoder_method import (
    Attention,
    EncoderMethod,
    LayerTokens,
    Reduction,
    Step,
    constant_ratio,
    left_at,
)
from mmcompress.ranking import top_indices
from mmcompress.registry import register
from mmcompress.types import EncoderFacts, Needs

_DEPTH, _PRUNING_LAYERS = 12, (1, 3, 6, 9, 11)
_QUIET, _LOUD = 0.01, 0.7


@register(
    "zerotprune",
    summary="Weighted PageRank on the attention graph of a few encoder layers, similar tokens first.",
    family="encoder attention",
    stage="encoder",
    paper="Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph, arXiv:2305.17328",
)
@dataclass(frozen=True)
class ZeroTPrune(EncoderMethod):
    """Importance and similarity pruning at the end of a few layers (Sections 3.2 and 3.3), here 1, 3, 6, 9, 11 of 12.

    Importance is weighted PageRank on the attention map of a layer, per head: 50 iterations in the first quarter of
    the encoder, 1 in the last, 10 between. Heads whose scores, of mean 1, vary by less than 0.01 or more than 0.7 are
    left out, unless all are; the others are joined by the root of their mean square. After one iteration, the less
    important half of the patches is compared with the other by keys, and its most similar ones are pruned; what then
    ranks lowest on the graph that is left, rows summing to 1 again, goes too. Each of the two removes half of what
    the layer does.

    Args:
        start: where importance comes from: "cls" begins with CLS at the root of N times the others, "uniform" with
            all tokens alike.
        ratios: shares of the tokens left by every pruning layer but the last, which leaves `keep`; shares below `keep`
            count as `keep`. The paper searches them; None: each layer keeps the same fraction.
    """

    start: Literal["cls", "uniform"] = "cls"
    ratios: tuple[float, ...] | None = None

    def needs(self, encoder: EncoderFacts) -> Needs:
        """The attention graph and the keys of the pruning layers."""
        layers = _layers(encoder)
        return Needs(received_attention=layers, keys=layers, cls_rows=layers if self.start == "cls" else ())

    def schedule(self, tokens: int, keep: int, encoder: EncoderFacts) -> list[Step]:
        """The given ratios, or a constant one, over the pruning layers."""
        layers = _layers(encoder)
        if self.ratios is None:
            targets = constant_ratio(tokens, keep, len(layers))
        else:
            require_ratios(self.info.name, self.ratios, len(layers))
            targets = left_by(self.ratios, tokens, keep)
        lefts = left_at(layers, targets, tokens, encoder)
        return [Step(left, first=(before - left) // 2) for before, left in pairwise([tokens, *lefts])]

    def reduce(self, tokens: LayerTokens, step: Step) -> Reduction:
        """Similarity among the less important half first, importance among what is left then."""
        attention, protected = tokens.attention, tokens.protected
        assert attention is not None
        position = 4 * tokens.layer // tokens.encoder.depth
        iterations = {0: 50, 3: 1}.get(position, 10)
        similar = self._similar(attention, protected, step.first)
        alive = torch.ones(tokens.size.shape, dtype=torch.bool, device=similar.device).scatter(1, similar, False)
        places = alive.nonzero()[:, 1].view(len(alive), -1)
        query, key = (take(part.transpose(1, 2), places).transpose(1, 2) for part in (attention.query, attention.key))
        scores = self.importance(Attention(query, key, attention.scaling), iterations)
        best = protected + top_indices(scores[:, protected:], step.left)
        front = torch.arange(protected, device=best.device).expand(len(best), -1)
        return Reduction.keep(places.gather(1, torch.cat([front, best], dim=1)), tokens.size)

    def _similar(self, attention: Attention, protected: int, count: int) -> Tensor:
        """`[images, count]` tokens of the less important half that are closest to one of the other half."""
        ranked = protected + self.importance(attention, 1)[:, protected:].argsort(dim=1, descending=True, stable=True)
        better, lesser = ranked.tensor_split([(ranked.shape[1] + 1) // 2], dim=1)
        unit = normalize(attention.key.float().transpose(1, 2).flatten(2), dim=-1)
        closeness = (take(unit, lesser) @ take(unit, better).mT).amax(dim=2)
        return lesser.gather(1, closeness.argsort(dim=1, descending=True, stable=True)[:, :count])

    def importance(self, attention: Attention, iterations: int) -> Tensor:
        """Scores `[images, tokens]` by PageRank on the attention of each head."""
        query, key, scaling = attention
        lse = ops.attention_lse(query, key, scaling)
        scores = torch.ones_like(lse)
        if self.start == "cls":
            scores[..., 0] = scores.shape[-1] ** 0.5
            scores = scores / scores.mean(dim=-1, keepdim=True)
        for _ in range(iterations):
            scores = ops.weighted_colsum(query, key, scaling, None, lse, scores)
        spread = scores.var(dim=-1, correction=0, keepdim=True)
        telling = (spread >= _QUIET) & (spread <= _LOUD)
        telling = telling | ~telling.any(dim=1, keepdim=True)
        return ((scores.square() * telling).sum(dim=1) / telling.sum(dim=1)).sqrt()


def _layers(encoder: EncoderFacts) -> tuple[int, ...]:
    return encoder.scale_layers(_PRUNING_LAYERS, _DEPTH)
