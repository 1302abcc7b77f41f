"""What Quest knows of the keys in vLLM's blocks, and what it therefore has read."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.budget import Budget
from mmcompress.integrations.vllm.kv.paged import Steps
from mmcompress.policies.quest import Pages, Quest
from mmcompress.sparse_reader import Entries, Step


class PageReader:
    """Bounds of all pages of one layer's cache, whatever request they are of; a block is some pages.

    Args:
        policy: how pages are chosen.
        keep: how many entries are read of those that a request holds.
        cache: `[blocks, kv_heads, block, 2 * dim]`.
    """

    def __init__(self, policy: Quest, keep: Budget, cache: Tensor) -> None:
        self._policy, self._keep = policy, keep
        blocks, heads, block, width = cache.shape
        self._per_block = block // policy.page
        bounds = cache.new_zeros(1, heads, blocks * self._per_block, width // 2)
        self._pages = Pages(bounds, bounds.clone(), policy.page, blocks * block)

    def take_in(self, key: Tensor, slots: Tensor) -> None:
        """Note keys `[tokens, kv_heads, dim]` that go into `slots` `[tokens]`; a page is new with its first slot."""
        pages = slots // self._policy.page
        new = pages[slots % self._policy.page == 0]
        self._pages.low[:, :, new], self._pages.high[:, :, new] = torch.inf, -torch.inf
        key = key.transpose(0, 1)[None].to(self._pages.low.dtype)
        self._pages.widen(key, pages[None, None, :, None], torch.ones_like(pages, dtype=torch.bool)[:, None])

    def choose(self, query: Tensor, steps: Steps) -> tuple[Tensor, Tensor]:
        """What each step reads: slots `[steps, kv_heads, read]`, and which of them are any.

        Args:
            query: `[steps, heads, dim]`.
            steps: where their requests' entries are.
        """
        held = steps.positions[:, None] + 1
        entries = Entries(torch.arange(int(held.max()), device=held.device) < held)
        keep = [self._keep.tokens(count) for count in entries.held]
        summary = self._of(steps.blocks)
        key = query.new_empty(len(query), summary.low.shape[1], 0, query.shape[2])  # bounds speak for the keys
        reading = self._policy.choose(Step(query, key, entries, keep, summary))
        return steps.slots(reading.columns), reading.valid

    def _of(self, blocks: Tensor) -> Pages:
        """The bounds of requests' pages, given `blocks` `[requests, blocks]`."""
        inside = torch.arange(self._per_block, device=blocks.device)
        pages = (blocks[..., None] * self._per_block + inside).flatten(1)
        low, high = (bounds[0, :, pages].transpose(0, 1) for bounds in (self._pages.low, self._pages.high))
        return Pages(low, high, self._policy.page, pages.shape[1] * self._policy.page)
