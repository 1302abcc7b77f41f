"""What one pass of the text model carries through its layers where tokens are removed between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmcompress.compact import spread, take
from mmcompress.encoder_method import Attention
from mmcompress.integrations.hf.cache import CacheState, PrunedCache


@dataclass(frozen=True)
class Removed:
    """What was taken out before `layer`: see `compact.spread`."""

    layer: int
    keep: Tensor
    index: Tensor


@dataclass
class Prompt:
    """The columns of a batch that are left at some depth of the LLM.

    Args:
        valid: `[batch, columns]` bool, which are no padding.
        item: `[batch, columns]` number of the image or clip that a column is of and may be removed from, else -1.
        text: `[batch, columns]` bool, which are text.
        tail: how many of the last columns were said after the prompt.
        source: `[batch, columns]` the column of the LLM's input that each one is.
    """

    valid: Tensor
    item: Tensor
    text: Tensor
    tail: int = 0
    source: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.source = torch.arange(self.valid.shape[1], device=self.valid.device).repeat(len(self.valid), 1)

    @property
    def visual(self) -> Tensor:
        """`[batch, columns]` bool, which may be removed."""
        return self.item >= 0

    @property
    def asked(self) -> Tensor:
        """`[batch, columns]` bool, which the choice may depend on."""
        asked = self.valid.clone()
        asked[:, asked.shape[1] - self.tail :] = False
        return asked

    def take(self, origin: Tensor) -> Prompt:
        """The columns `origin` `[batch, left]`, -1 where padded."""
        here = origin >= 0
        item = take(self.item, origin).masked_fill(~here, -1)
        taken = Prompt(here, item, take(self.text, origin) & here, self.tail)
        taken.source = take(self.source, origin)
        return taken

    def to(self, device: torch.device) -> Prompt:
        """The same on `device`."""
        moved = Prompt(self.valid.to(device), self.item.to(device), self.text.to(device), self.tail)
        moved.source = self.source.to(device)
        return moved


@dataclass
class Run:
    """One pass of the text model on its way through the layers.

    Args:
        cache: where it stores keys and values.
        state: what the cache is to remember, changed on the way.
        current: `[batch, length]` which of the columns that entered are no padding.
        past: `[batch, stored]` which of the columns stored before are none.
        ids: their position ids `[..., batch, length]`.
        inputs: what entered `[batch, length, width]`.
        prompt: the columns, if visual ones are among them; None in passes that remove nothing.
        plans: per row how many visual tokens each layer of the method leaves.
        totals: per row how many entered.
        removed: what was taken out so far.
        replaced: by layer, what it gets instead of the model's own arguments.
        keys: `[batch, stored + columns]` which keys of the layer that ran last are no padding.
        through: what passed through the attention of the layer that ran last, if it is read.
        parts: what the layer that is running took in and gave out, if it is observed.
        observed: per observed layer what the method made of that `[batch, columns]`.
    """

    cache: PrunedCache | None
    state: CacheState
    current: Tensor
    past: Tensor
    ids: Tensor
    inputs: Tensor
    prompt: Prompt | None = None
    plans: list[list[int]] = field(default_factory=list)
    totals: list[int] = field(default_factory=list)
    removed: list[Removed] = field(default_factory=list)
    replaced: dict[int, dict[str, Any]] = field(default_factory=dict)
    keys: Tensor = field(init=False)
    through: dict[int, Attention] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)
    observed: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.keys = torch.cat([self.past, self.current], dim=1)

    def left(self) -> dict[int, list[int]]:
        """By layer, how many tokens of each row's prompt were left before it."""
        tail = 0 if self.prompt is None else self.prompt.tail
        return {removed.layer: ((removed.index >= 0).sum(dim=1) - tail).tolist() for removed in self.removed}

    def restore(self, hidden: Tensor) -> Tensor:
        """Spread `hidden` over all columns that entered, and tell the cache which layers never stored them."""
        for removed in reversed(self.removed):
            keep, index = removed.keep.to(hidden.device), removed.index.to(hidden.device)
            hidden = spread(hidden, keep, index)
            if self.cache is not None:
                self.cache.drop(keep.shape[1] - index.shape[1], removed.layer)
        return hidden
