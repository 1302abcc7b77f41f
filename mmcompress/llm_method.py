"""The base class of methods that remove visual tokens between decoder layers while the prompt is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mmcompress import ops
from mmcompress.errors import SpecError
from mmcompress.method import check_selection
from mmcompress.registry import MethodInfo
from mmcompress.types import Positions, Selection

ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class LLMFacts:
    """What a method may know of the language model before any forward pass.

    Args:
        layers: number of decoder layers.
        heads: query heads of each.
    """

    layers: int
    heads: int

    def scale_layers(self, layers: Sequence[int], paper_depth: int) -> tuple[int, ...]:
        """Map ascending layers stated for `paper_depth` layers to this depth, each one in 1..depth-1 and distinct.

        Raises:
            SpecError: the model has too few layers.
        """
        if len(layers) >= self.layers:
            raise SpecError(f"tokens are to be removed before {len(layers)} layers, but the LLM has {self.layers}.")
        scaled = [round(layer * self.layers / paper_depth) for layer in layers]
        for place, layer in enumerate(scaled):
            scaled[place] = max(layer, 1 if place == 0 else scaled[place - 1] + 1)
        for place in reversed(range(len(scaled))):
            scaled[place] = min(scaled[place], self.layers - len(scaled) + place)
        return tuple(scaled)


@dataclass(frozen=True)
class LLMNeeds:
    """What a method reads before the layers that follow a removal; nothing of it is an attention map.

    Args:
        previous: queries and keys of the layer that ran last.
        upcoming: queries and keys that the layer about to run would make of all its tokens.
        transitions: layers whose inputs and outputs of attention and MLP are observed.
        inputs: the embeddings that entered the LLM.
        normed: what the LLM's last normalisation would make of the hidden states.
        rotary: cosines and sines of the tokens' positions.
    """

    previous: bool = False
    upcoming: bool = False
    transitions: tuple[int, ...] = ()
    inputs: bool = False
    normed: bool = False
    rotary: bool = False


class RowAttention(NamedTuple):
    """What passes through a layer's attention for one row.

    Args:
        query: `[heads, tokens, dim]`, rotated to positions like the keys.
        key: `[kv_heads, past + tokens, dim]`; those of earlier turns come first.
        scaling: factor on the logits.
    """

    query: Tensor
    key: Tensor
    scaling: float

    @property
    def past(self) -> int:
        """How many keys are of earlier turns."""
        return self.key.shape[1] - self.query.shape[1]

    def rows(self, tokens: Tensor) -> Tensor:
        """Causal softmax rows of the queries numbered `tokens`, float32 `[heads, rows, tokens]`, earlier turns cut."""
        return self._rows(tokens)[0, :, :, self.past :]

    def mean_row(self, tokens: Tensor) -> Tensor:
        """`rows` averaged over heads and queries `[tokens]`; few exist at a time, however many are asked for."""
        blocks = [self._rows(block, heads="mean", rows="sum") for block in tokens.split(ROWS_AT_ONCE)]
        return torch.cat(blocks)[:, self.past :].sum(dim=0) / len(tokens)

    def _rows(self, tokens: Tensor, heads: str | None = None, rows: str | None = None) -> Tensor:
        query, last_key = self.query[None, :, tokens], self.past + tokens
        return ops.attention_rows(query, self.key[None], self.scaling, last_key, heads=heads, rows=rows)


@dataclass(frozen=True)
class PromptRow:
    """One row of a batch, without padding, as it stands before a decoder layer.

    Args:
        layer: the layer about to run.
        total: visual tokens that entered the LLM.
        visual: `[tokens]` bool, the visual tokens that are left; separators are none.
        text: `[tokens]` bool.
        hidden: `[tokens, width]` what enters the layer.
        source: `[tokens]` where in `inputs` each token comes from.
        previous: see `LLMNeeds`, like all that follow; None unless asked for.
        upcoming: of the layer about to run.
        observed: `[layers so far, tokens]` what `LLMMethod.observe` said of every observed layer.
        inputs: `[tokens at first, width]`.
        normed: `[tokens, width]`.
        rotary: cosines and sines `[tokens, head dim]`.
    """

    layer: int
    total: int
    visual: Tensor
    text: Tensor
    hidden: Tensor
    source: Tensor
    previous: RowAttention | None = None
    upcoming: RowAttention | None = None
    observed: Tensor | None = None
    inputs: Tensor | None = None
    normed: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None

    @property
    def images(self) -> Tensor:
        """Where the visual tokens are, ascending `[visual]`."""
        return self.visual.nonzero()[:, 0]

    @property
    def last(self) -> Tensor:
        """Where the last token is `[1]`."""
        return torch.tensor([len(self.visual) - 1], device=self.visual.device)

    @property
    def question(self) -> Tensor:
        """Where the text behind the last visual token is, ascending; the last token where there is no such text."""
        after = self.text.clone()
        after[: int(self.images[-1]) + 1] = False
        after[-1] |= not bool(after.any())
        return after.nonzero()[:, 0]


class LLMMethod(ABC):
    """Answers two questions: before which layers how many visual tokens stay, and which.

    Visual tokens of a row are one pool, whichever image they are of. Subclasses are frozen dataclasses whose fields are
    the options; `keep`, the share of its visual tokens that a row has left in the last layer, never is one of them.
    """

    info: ClassVar[MethodInfo]

    @property
    def exact_count(self) -> bool:
        """Whether exactly the planned number stays; False only where a rule keeps another number by definition."""
        return True

    @property
    def positions(self) -> Positions:
        """How the authors number what stays, where positions are one-dimensional."""
        return "original"

    def needs(self, llm: LLMFacts) -> LLMNeeds:
        """What is to be tapped, with layers resolved for this model."""
        return LLMNeeds()

    @abstractmethod
    def layers(self, llm: LLMFacts) -> tuple[int, ...]:
        """The layers before which tokens are removed, ascending, each in 1..depth-1.

        Raises:
            SpecError: the model has too few layers.
        """

    @abstractmethod
    def schedule(self, tokens: int, keep: int, ratio: float, llm: LLMFacts) -> list[int]:
        """How many of a row's `tokens` are left from each of the layers on.

        Args:
            tokens: visual tokens of the row that enter the LLM.
            keep: how many the last layer is to have; `tokens` unless the method takes a budget.
            ratio: the same as a share of `tokens`, as the user wrote it.
            llm: the model.
        """

    def observe(self, attention: tuple[Tensor, Tensor], mlp: tuple[Tensor, Tensor]) -> Tensor:
        """What to remember of each token of a row when a layer has run `[tokens]`, for methods that observe layers.

        Args:
            attention: what entered the layer's attention behind its normalisation, and what left it `[tokens, width]`.
            mlp: likewise.
        """
        raise NotImplementedError

    @abstractmethod
    def select(self, row: PromptRow, left: int) -> Selection:
        """Choose `left` of the row's visual tokens, numbered among these; called only when there are more."""

    def plan(self, tokens: int, keep: int, ratio: float, llm: LLMFacts) -> list[int]:
        """The checked schedule.

        Raises:
            SpecError: it is none.
        """
        lefts = self.schedule(tokens, keep, ratio, llm)
        counts = [tokens, *lefts]
        within = counts == sorted(counts, reverse=True) and counts[-1] >= (1 if self.info.takes_keep else 0)
        if len(lefts) != len(self.layers(llm)) or not within or (self.info.takes_keep and counts[-1] != keep):
            raise SpecError(f"method {self.info.name!r} planned {counts} visual tokens for a budget of {keep}.")
        return lefts

    def plan_average(self, tokens: int, average: float, llm: LLMFacts) -> list[int]:
        """The checked schedule that leaves most, but at most `average` tokens per layer; at least one in the last.

        Raises:
            SpecError: with one in the last layer there still are more, by a token or more.
        """
        starts, ends = (0, *self.layers(llm)), (*self.layers(llm), llm.layers)

        def mean(keep: int) -> float:
            counts = (tokens, *self.plan(tokens, keep, keep / tokens, llm))
            return sum(n * (end - start) for n, start, end in zip(counts, starts, ends, strict=True)) / llm.layers

        if mean(1) - 1 > average:
            raise SpecError(
                f"{self.info.name} cannot leave {average / tokens:.1%} of the visual tokens per layer on average: with "
                f"its layers it is {mean(1) / tokens:.1%} at the least."
            )
        keep = max(1, bisect_right(range(1, tokens + 1), average, key=mean))
        return self.plan(tokens, keep, keep / tokens, llm)

    def reduce(self, row: PromptRow, left: int) -> Selection:
        """The checked selection of a row that has more than `left` visual tokens."""
        if self.exact_count and left == 0:
            return Selection(torch.empty(0, dtype=torch.long, device=row.visual.device))
        selection = self.select(row, left)
        if self.exact_count or len(selection) > 0:
            tokens = int(row.visual.sum())
            check_selection(self.info.name, selection, tokens, left if self.exact_count else tokens, self.exact_count)
        return selection
