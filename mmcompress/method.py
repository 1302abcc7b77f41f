"""The base class of visual methods: it owns all that can be got wrong once, so that a method is one answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from mmcompress.budget import Budget
from mmcompress.errors import InputError, SpecError
from mmcompress.registry import MethodInfo
from mmcompress.types import EncoderFacts, Needs, Selection, Space, VisualItem

if TYPE_CHECKING:
    from mmcompress.llm_method import LLMMethod


class VisualMethod(ABC):
    """Answers one question about an item: which tokens stay, and what do they absorb?

    Subclasses are frozen dataclasses whose fields are the options; `keep` is never one of them. Where the authors'
    code departs from their paper, `compat: Literal["none", "official"] = "none"` is the one switch that follows it.
    """

    info: ClassVar[MethodInfo]

    @property
    def exact_count(self) -> bool:
        """Whether exactly the budget is kept; False only where a rule keeps fewer by definition."""
        return True

    @property
    def space(self) -> Space:
        """Where weights apply: to "projected" tokens, or "pre_projector" to the features that become tokens."""
        return "projected"

    @property
    def newlines(self) -> bool:
        """Whether an item's separators (newlines after rows, images or clips) stay; they are never candidates."""
        return True

    @property
    def second_part(self) -> LLMMethod | None:
        """What the method goes on to do inside the LLM, by a rule that takes no budget; None if nothing."""
        return None

    def needs(self, encoder: EncoderFacts) -> Needs:
        """The statistics to tap, with layers resolved for this encoder."""
        return Needs()

    @abstractmethod
    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Choose at most `budget` of the item's tokens; called only when `0 < budget < len(item)`."""

    def select_batch(self, items: Sequence[VisualItem], budgets: Sequence[int], needs: Needs) -> list[Selection]:
        """Choose for several items at once; override where vectorising pays. Answers never depend on neighbours."""
        return [self.select(item, budget, needs) for item, budget in zip(items, budgets, strict=True)]

    def compress(self, items: Sequence[VisualItem], keep: Budget, needs: Needs) -> list[Selection]:
        """Select for every item under its budget; an item no larger than its budget stays whole.

        Raises:
            InputError: a statistic the method reads is NaN or infinite.
        """
        selections = [Selection.everything(len(item), item.embeddings.device) for item in items]
        budgets = [keep.tokens(len(item)) for item in items]
        reducible = [i for i, item in enumerate(items) if budgets[i] < len(item)]
        for i in reducible:
            require_finite(items[i], needs)
        chosen = self.select_batch([items[i] for i in reducible], [budgets[i] for i in reducible], needs)
        for i, selection in zip(reducible, chosen, strict=True):
            check_selection(self.info.name, selection, len(items[i]), budgets[i], self.exact_count)
            selections[i] = selection
        return selections


def check_selection(name: str, selection: Selection, tokens: int, budget: int, exact: bool = True) -> None:
    """Refuse a selection that is none of `budget` out of `tokens`, or of fewer unless it must be `exact`."""
    kept, anchor, weight = len(selection), selection.anchor, selection.weight
    if not 0 < kept <= budget or (exact and kept != budget):
        problem = f"{kept} tokens for a budget of {budget}"
    elif anchor.dtype != torch.int64 or anchor.dim() != 1:
        problem = f"anchors of type {anchor.dtype} and shape {list(anchor.shape)} instead of int64 [kept]"
    elif _repeats_or_leaves(anchor, tokens):
        problem = f"anchors that repeat or lie outside 0..{tokens - 1}"
    elif weight is not None and weight.shape != (kept, tokens):
        problem = f"weights of shape {list(weight.shape)} instead of {[kept, tokens]}"
    else:
        return
    raise SpecError(f"method {name!r} returned {problem}.")


def _repeats_or_leaves(anchor: Tensor, tokens: int) -> bool:
    """Whether anchors are not all different, or not all among `tokens`."""
    ascending = anchor.sort().values
    repeats = (ascending[1:] == ascending[:-1]).any()
    return bool(repeats | (ascending[0] < 0) | (ascending[-1] >= tokens))


def require_finite(item: VisualItem, needs: Needs) -> None:
    """Refuse an item with NaN or infinity among what `needs` reads."""
    read = [getattr(item, name)[layer] for name, layers in needs.layers().items() for layer in layers]
    read += [getattr(item, name) for name in ("embeddings", "features", "text") if getattr(needs, name)]
    # To ask every value takes ten times as long; the extremes of what contains NaN are NaN.
    extremes = [torch.stack(value.aminmax()) for value in read if value is not None and value.numel()]
    if not all(bool(pair.isfinite().all()) for pair in extremes):
        raise InputError(f"{item.label}: its visual features contain NaN or infinity, so tokens cannot be ranked.")
