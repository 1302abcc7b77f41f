"""Quest: in every step, read the pages of the cache whose keys could be attended to most."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmcompress import ops
from mmcompress.errors import SpecError
from mmcompress.llm_method import LLMFacts
from mmcompress.registry import register_policy
from mmcompress.sparse_reader import Duty, Entries, Reading, SparseReader, Step, Summary


@dataclass(frozen=True)
class Pages:
    """Bounds of the keys, page by page.

    Args:
        low: `[batch, kv_heads, pages, dim]`, the lowest value of each channel; inf where a row has no such page.
        high: likewise the highest; -inf where there is none.
        size: how many entries of a row, one behind the other, are a page.
        columns: how many columns of the cache are covered.
    """

    low: Tensor
    high: Tensor
    size: int
    columns: int

    def take(self, rows: Tensor) -> Pages:
        """Only the rows numbered `rows`."""
        rows = rows.to(self.low.device)
        return replace(self, low=self.low[rows], high=self.high[rows])

    def widen(self, key: Tensor, page: Tensor, valid: Tensor) -> None:
        """Make the bounds hold for keys more.

        Args:
            key: `[batch, kv_heads, new, dim]`.
            page: the page of each, to be broadcast to the keys.
            valid: likewise bool, which of them are entries.
        """
        page = page.expand_as(key)
        self.low.scatter_reduce_(2, page, key.masked_fill(~valid, torch.inf), "amin")
        self.high.scatter_reduce_(2, page, key.masked_fill(~valid, -torch.inf), "amax")


@register_policy(
    "quest",
    summary="In every step, the pages whose bounds allow the highest logits; nothing is evicted.",
    family="sparse reading",
    stage="kv",
    paper="Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, arXiv:2406.10774",
    licence="MIT",
)
@dataclass(frozen=True)
class Quest(SparseReader):
    """Pages are ranked by an upper bound of what the query can make of their keys (Section 3).

    As many whole pages are read as the budget holds, at least one. With `compat="official"` at least three are.

    Args:
        page: entries of a page.
        dense_layers: the first layers, which read everything; not scaled to the model's depth.
    """

    page: int = 16
    dense_layers: int = 2

    def __post_init__(self) -> None:
        if self.page < 1:
            raise SpecError(f"quest: page={self.page} must be at least 1.")
        if self.dense_layers < 0:
            raise SpecError(f"quest: dense_layers={self.dense_layers} must be at least 0.")

    def duties(self, llm: LLMFacts) -> list[Duty]:
        """All but the first layers choose for themselves."""
        if self.dense_layers >= llm.layers:
            raise SpecError(f"quest: dense_layers={self.dense_layers} leaves none of the LLM's {llm.layers} layers.")
        return [Duty(layer < self.dense_layers, layer >= self.dense_layers) for layer in range(llm.layers)]

    def summarise(self, before: Summary | None, key: Tensor, entries: Entries) -> Pages:
        """The bounds of all pages, those that were there widened by what is new."""
        if not isinstance(before, Pages) or before.size != self.page:
            return self._summary(key, entries)
        first, low, high = before.columns, before.low, before.high
        more = -(-max(entries.held) // self.page) - low.shape[2]
        if more > 0:
            low, high = pad(low, (0, 0, 0, more), value=torch.inf), pad(high, (0, 0, 0, more), value=-torch.inf)
        pages = Pages(low, high, self.page, key.shape[2])
        numbers = entries.number[:, None, first:, None] // self.page
        pages.widen(key[:, :, first:], numbers.clamp(max=low.shape[2] - 1), entries.valid[:, None, first:, None])
        return pages

    def _summary(self, key: Tensor, entries: Entries) -> Pages:
        newest = entries.newest[:, None]
        # Behind a row's last entry it is repeated, which changes no bound of its page.
        places = torch.arange(max(entries.held), device=key.device).minimum(newest)
        column = entries.column.gather(1, places)[:, None, :, None]
        low, high = ops.page_bounds(key.take_along_dim(column, dim=2), self.page)
        none = (torch.arange(low.shape[2], device=key.device) > newest // self.page)[:, None, :, None]
        low, high = low.masked_fill(none, torch.inf), high.masked_fill(none, -torch.inf)
        return Pages(low, high, self.page, key.shape[2])

    def bounds(self, step: Step) -> Tensor:
        """What the logits of a page cannot exceed, unscaled, float32 `[batch, kv_heads, group, pages]`."""
        assert isinstance(step.summary, Pages)
        query, low, high = step.grouped.float(), step.summary.low.float(), step.summary.high.float()
        bounds = query.clamp(min=0) @ high.mT + query.clamp(max=0) @ low.mT
        none = torch.arange(low.shape[2], device=low.device) > step.entries.newest[:, None] // self.page
        return bounds.masked_fill(none[:, None, None], -torch.inf)

    def choose(self, step: Step) -> Reading:
        """The entries of the best pages."""
        counts = [self._pages(*counts) for counts in zip(step.keep, step.entries.held, strict=True)]
        pages, wanted = self.best(self.bounds(step), step.entries.newest // self.page, counts)
        inside = torch.arange(self.page, device=pages.device)
        numbers = (pages[..., None] * self.page + inside).flatten(2)
        valid = wanted.repeat_interleave(self.page, dim=2) & (numbers <= step.entries.newest[:, None, None])
        column = step.entries.column[:, None].expand(-1, numbers.shape[1], -1)
        return Reading(column.gather(2, numbers.clamp(max=column.shape[2] - 1)), valid)

    def _pages(self, keep: int, held: int) -> int:
        """How many pages are read of a row that holds so many entries."""
        least = 3 if self.compat == "official" else 1
        pages = -(-held // self.page)
        return pages if keep >= held else min(max(least, keep // self.page), pages)
