"""DiffRate: prune what CLS ignores, merge what it hardly looks at, at rates learnt per layer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmcompress.encoder_method import EncoderMethod, LayerTokens, Place, Reduction, Step
from mmcompress.errors import SpecError
from mmcompress.merging import Matching
from mmcompress.registry import register
from mmcompress.types import EncoderFacts, Needs


@register(
    "diffrate",
    summary="Pruning and merging in every encoder layer by CLS attention, at rates from a learnt table.",
    family="CLS-guided pruning and merging",
    stage="encoder",
    paper="DiffRate: Differentiable Compression Rate for Efficient Vision Transformers, arXiv:2305.17997",
    requires=("rates",),
)
@dataclass(frozen=True)
class DiffRate(EncoderMethod):
    """Learnt pruning and merging rates applied between attention and MLP of every layer (Section 3).

    A layer sorts its tokens by the attention they get from CLS, averaged over heads, drops the last ones, and merges
    those before them into the most similar of the rest by a plain mean. A merged token counts as the patches it
    stands for, those of merged ones times their similarity.

    The rates are learnt for one network and cost. Here the table says how removal is spread over layers, and over
    pruning and merging: another depth takes each entry at its relative depth, and the counts are stretched to the
    tokens there are and the budget, rounding in favour of tokens. Entries for layers behind the features are left out.

    Args:
        rates: path of a JSON file {"tokens": 197, "prune_kept_num": [...], "merge_kept_num": [...]}: tokens of the
            network the rates were learnt for, and per layer how many are left after pruning and after merging, CLS
            counted in all three. None are shipped: the authors publish theirs without a licence.
        proportional: attention counts a token as many times as it stands for patches.
    """

    rates: str | None = None
    proportional: bool = True

    @property
    def place(self) -> Place:
        """Between attention and MLP."""
        return "attention"

    def needs(self, encoder: EncoderFacts) -> Needs:
        """The CLS row of every layer."""
        return Needs(cls_rows=tuple(range(encoder.used)))

    def schedule(self, tokens: int, keep: int, encoder: EncoderFacts) -> list[Step]:
        """The table, stretched."""
        before, entries = self._table
        pruned, merged = [0] * encoder.used, [0] * encoder.used
        for number, (after_pruning, after_merging) in enumerate(entries):
            layer = round(number * encoder.depth / len(entries))
            if layer < encoder.used:
                pruned[layer] += before - after_pruning
                merged[layer] += after_pruning - after_merging
                before = after_merging
        removed = sum(pruned) + sum(merged)
        if removed == 0:
            raise SpecError(f"diffrate: {self.rates} removes no tokens in the layers used here.")
        steps, sofar = [], 0
        for by_pruning, by_merging in zip(pruned, merged, strict=True):
            edges = (sofar, sofar + by_pruning, sofar + by_pruning + by_merging)
            start, middle, end = (edge * (tokens - keep) // removed for edge in edges)
            steps.append(Step(tokens - end, first=middle - start))
            sofar = edges[-1]
        return steps

    def reduce(self, tokens: LayerTokens, step: Step) -> Reduction:
        """Sort, drop, merge; the tokens stay sorted."""
        order = self.ranking(tokens)
        survivors = order.shape[1] - step.first
        outputs = step.left + tokens.protected
        kept, tail = order[:, :outputs], order[:, outputs:survivors]
        unit = normalize(tokens.hidden.float(), dim=-1)
        similarity = _take(unit, tail) @ _take(unit, kept).transpose(-1, -2)
        best, nearest = similarity[..., tokens.protected :].max(dim=-1)
        group = torch.zeros_like(order).scatter(1, kept, torch.arange(outputs, device=order.device).expand_as(kept))
        group.scatter_(1, tail, nearest + tokens.protected)
        mass = torch.zeros_like(tokens.size).scatter(1, order[:, :survivors], 1.0)
        counted = mass.scatter(1, tail, best.clamp(min=0))  # a size is never negative
        return Reduction.average(Matching(kept, group), mass, tokens.size * counted)

    def ranking(self, tokens: LayerTokens) -> Tensor:
        """Places by falling attention from CLS, CLS first, `[images, tokens]`."""
        assert tokens.attention is not None
        query, key, scaling = tokens.attention
        logits = (query[:, :, :1].float() @ key.float().transpose(-1, -2) * scaling)[:, :, 0]
        if self.proportional:
            logits = logits + tokens.size.log()[:, None]
        importance = logits.softmax(dim=-1).mean(dim=1)
        importance[:, : tokens.protected] = torch.inf
        return importance.argsort(dim=-1, descending=True, stable=True)

    @cached_property
    def _table(self) -> tuple[int, list[tuple[int, int]]]:
        """Tokens of the network, and per layer what is left after pruning and after merging."""
        path = Path(str(self.rates)).expanduser()
        try:
            written: Any = json.loads(path.read_text(encoding="utf-8"))
            tokens = written["tokens"]
            entries = list(zip(written["prune_kept_num"], written["merge_kept_num"], strict=True))
            falling = [tokens, *(count for entry in entries for count in entry)]
            if not entries or any(type(count) is not int or count < 1 for count in falling):
                raise ValueError("counts are positive integers")
            if falling != sorted(falling, reverse=True):
                raise ValueError("from layer to layer, and from pruning to merging, counts never rise")
        except (OSError, ValueError, TypeError, KeyError) as error:
            form = '{"tokens": 197, "prune_kept_num": [...], "merge_kept_num": [...]}'
            raise SpecError(f"diffrate: rates={self.rates!r} is no JSON file of the form {form}: {error}.") from error
        return tokens, entries


def _take(values: Tensor, places: Tensor) -> Tensor:
    return values.take_along_dim(places[..., None], dim=1)
