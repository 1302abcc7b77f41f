"""PiToMe: tokens with many look-alikes merge, the others are protected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import elu, normalize

from mmcompress.encoder_method import (
    EncoderMethod,
    LayerTokens,
    Reduction,
    Step,
    constant_ratio,
    require_halving,
)
from mmcompress.merging import Matching, soft_match
from mmcompress.registry import register
from mmcompress.statistics import key_metric
from mmcompress.types import EncoderFacts, Needs

_DEPTH, _FIRST_BY_ENERGY = 24, 13


@register(
    "pitome",
    summary="Merging of the tokens with the most look-alikes in every encoder layer, by the same ratio in each.",
    family="merging",
    stage="encoder",
    paper="Accelerating Transformers with Spectrum-Preserving Token Merging, arXiv:2405.16148",
    licence="CC BY-NC 4.0",
)
@dataclass(frozen=True)
class PiToMe(EncoderMethod):
    """Energy-guided matching at the end of every layer, as published for LLaVA (Section 3).

    The energy of a token is its mean similarity to all others, each cut off softly below a margin that falls from
    layer to layer. To remove r tokens, the 2r of highest energy are dealt out in two halves, and those of the one
    merge into the most similar ones of the other. Every layer keeps the same fraction, at least half.

    Args:
        matching: "staged" matches tokens at even with odd places up to layer 12 of 24, as ToMe does, then by energy;
            "energy" and "places" do one of these in every layer; "interleaved" deals out all tokens by energy and
            merges the r most similar pairs.
        metric: what is compared: the "hidden" states, or the "keys" averaged over heads.
        average: "plain" mean of merging tokens, or one weighted by the "size" of each, the patches it stands for.
        margin: cut-off of similarity in the first layer; it falls to zero linearly.
    """

    matching: Literal["staged", "energy", "places", "interleaved"] = "staged"
    metric: Literal["hidden", "keys"] = "hidden"
    average: Literal["plain", "size"] = "plain"
    margin: float = 0.9

    def needs(self, encoder: EncoderFacts) -> Needs:
        """The keys of every layer where they are compared."""
        return Needs(key_metric=tuple(range(encoder.used)) if self.metric == "keys" else ())

    def schedule(self, tokens: int, keep: int, encoder: EncoderFacts) -> list[Step]:
        """A constant ratio."""
        require_halving("pitome", tokens, keep, encoder.used)
        steps, left = [], tokens
        for wanted in constant_ratio(tokens, keep, encoder.used):
            left = max(wanted, left - left // 2)
            steps.append(Step(left))
        return steps

    def reduce(self, tokens: LayerTokens, step: Step) -> Reduction:
        """One matching, averaged."""
        metric = tokens.hidden if tokens.attention is None else key_metric(*tokens.attention)
        count, matching = tokens.count - step.left, self.matching
        if matching == "staged":
            by_energy = tokens.layer >= tokens.encoder.scale_layer(_FIRST_BY_ENERGY, _DEPTH)
            matching = "energy" if by_energy else "places"
        if matching == "places":
            pairs = soft_match(metric, count, tokens.protected)
        else:
            scores = energy(metric[:, tokens.protected :], self.margin * (1 - tokens.layer / tokens.encoder.depth))
            ranked = tokens.protected + scores.argsort(dim=-1, descending=True, stable=True)
            pairs = _match_first(metric, ranked, count, step.left + count if matching == "interleaved" else 2 * count)
        mass = torch.ones_like(tokens.size) if self.average == "plain" else tokens.size
        return Reduction.average(pairs, mass, tokens.size)


def energy(metric: Tensor, margin: float) -> Tensor:
    """Mean similarity `[images, tokens]` of each of `metric` `[images, tokens, dim]` to all, softly cut at `margin`."""
    unit = normalize(metric.float(), dim=-1)
    return elu(unit @ unit.transpose(-1, -2) - margin).mean(dim=-1)


def _match_first(metric: Tensor, ranked: Tensor, count: int, candidates: int) -> Matching:
    """Merge `count` of the first `candidates` of `ranked` `[images, patches]` among each other; all others stay."""
    first, others = ranked[:, :candidates], ranked[:, candidates:]
    among = soft_match(metric.take_along_dim(first[..., None], dim=1), count)
    protected = torch.arange(metric.shape[1] - ranked.shape[1], device=metric.device).expand(len(metric), -1)
    staying = torch.cat([protected, others], dim=1)
    group = torch.empty(metric.shape[:2], dtype=torch.long, device=metric.device)
    group.scatter_(1, staying, torch.arange(staying.shape[1], device=metric.device).expand_as(staying))
    group.scatter_(1, first, staying.shape[1] + among.group)
    return Matching(torch.cat([staying, first.gather(1, among.kept)], dim=1), group)
