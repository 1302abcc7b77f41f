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
from mmcompress.encoder_method import EncoderMethod, LayerTokens, Reduction, Step, constant_ratio, left_at
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
        """Every image by itself: its attention map is held once, not for the batch."""
        assert tokens.attention is not None
        query, key, scaling = tokens.attention
        position = 4 * tokens.layer // tokens.encoder.depth
        iterations = {0: 50, 3: 1}.get(position, 10)
        kept = []
        for image in range(len(query)):
            graph = ops.attention_rows(query[image : image + 1], key[image : image + 1], scaling)[0]
            unit = normalize(key[image].float().transpose(0, 1).flatten(1), dim=-1)
            kept.append(self._prune(graph, unit, tokens.protected, iterations, step))
        return Reduction.keep(torch.stack(kept), tokens.size)

    def _prune(self, graph: Tensor, unit: Tensor, protected: int, iterations: int, step: Step) -> Tensor:
        ranked = protected + self.importance(graph, 1)[protected:].argsort(descending=True, stable=True)
        lesser, better = ranked[(len(ranked) + 1) // 2 :], ranked[: (len(ranked) + 1) // 2]
        closeness = (unit[lesser] @ unit[better].T).amax(dim=1)
        similar = lesser[closeness.argsort(descending=True, stable=True)[: step.first]]
        alive = torch.ones(len(unit), dtype=torch.bool, device=unit.device).index_fill(0, similar, False)
        alive_places = alive.nonzero()[:, 0]
        graph = graph[:, alive_places][:, :, alive_places]
        scores = self.importance(graph / graph.sum(dim=-1, keepdim=True), iterations)
        best = protected + top_indices(scores[protected:], step.left)
        return alive_places[torch.cat([torch.arange(protected, device=best.device), best])]

    def importance(self, graph: Tensor, iterations: int) -> Tensor:
        """Scores `[tokens]` by PageRank on attention maps `[heads, tokens, tokens]`."""
        tokens = graph.shape[-1]
        scores = torch.ones(len(graph), 1, tokens, device=graph.device)
        if self.start == "cls":
            scores[..., 0] = tokens**0.5
            scores = scores / scores.mean(dim=-1, keepdim=True)
        for _ in range(iterations):
            scores = scores @ graph
        spread = scores.var(dim=-1, correction=0)
        telling = (spread >= _QUIET) & (spread <= _LOUD)
        heads = scores[telling[:, 0]] if bool(telling.any()) else scores
        return heads[:, 0].square().mean(dim=0).sqrt()


def _layers(encoder: EncoderFacts) -> tuple[int, ...]:
    return encoder.scale_layers(_PRUNING_LAYERS, _DEPTH)
