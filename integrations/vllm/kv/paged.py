"""Attention over keys and values in blocks, where every token may read entries of its own choice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmcompress import ops
from mmcompress.integrations.vllm.kv.plan import Window


@dataclass(frozen=True)
class Paged:
    """Keys and values of a layer.

    Args:
        cache: `[blocks, kv_heads, block, 2 * dim]`, behind each key its value. A slot is a place in a block, counted
            through all blocks.
    """

    cache: Tensor

    @property
    def block(self) -> int:
        """The slots of a block."""
        return self.cache.shape[2]

    def store(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Put keys and values `[tokens, kv_heads, dim]` into `slots` `[tokens]`."""
        self.cache[slots // self.block, :, slots % self.block] = torch.cat([key, value], dim=-1).to(self.cache.dtype)

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[rows, kv_heads, read, dim]` in `slots` `[rows, kv_heads or 1, read]`."""
        heads = torch.arange(self.cache.shape[1], device=slots.device)[:, None]
        key, value = self.cache[slots // self.block, heads, slots % self.block].chunk(2, dim=-1)
        return key, value


def slots_of(blocks: Tensor, places: Tensor, block: int) -> Tensor:
    """Where entries of `places` `[..., read]` are, given their requests' `blocks` `[..., blocks]` of `block` slots."""
    return blocks.gather(-1, places // block) * block + places % block


@dataclass(frozen=True)
class Chunk:
    """Tokens of a prompt that are read together and see all that is before them.

    Args:
        tokens: where they are among those of the batch.
        slots: `[read]`, where the request's entries are, the last ones their own.
    """

    tokens: slice
    slots: Tensor

    def attend(self, query: Tensor, paged: Paged, scaling: float) -> Tensor:
        """Attention of these tokens `[tokens, heads, dim]`.

        Args:
            query: likewise.
            paged: the entries.
            scaling: factor on the logits.
        """
        key, value = paged.read(self.slots[None, None])
        places = torch.arange(len(self.slots), device=query.device)
        seen = places <= places[-len(query) :, None]
        output = scaled_dot_product_attention(
            query.transpose(0, 1)[None], key, value, attn_mask=seen, scale=scaling, enable_gqa=True
        )
        return output[0].transpose(0, 1)


@dataclass(frozen=True)
class Steps:
    """Tokens behind prompts, each of which reads a choice of its own of what its request holds.

    Args:
        tokens: `[steps]`, where they are among those of the batch.
        blocks: `[steps, blocks]`, their requests' blocks.
        positions: `[steps]`, their places in their requests.
        prompts: `[steps]`, how many tokens their requests' prompts have.
        block: the slots of a block.
    """

    tokens: Tensor
    blocks: Tensor
    positions: Tensor
    prompts: Tensor
    block: int

    def slots(self, places: Tensor) -> Tensor:
        """Where entries of `places` `[steps, heads, read]` are; such behind a step's own are given as its own."""
        places = places.minimum(self.positions[:, None, None])
        return slots_of(self.blocks[:, None].expand(-1, places.shape[1], -1), places, self.block)

    def within(self, window: Window) -> tuple[Tensor, Tensor]:
        """The entries that `window` leaves: slots `[steps, 1, read]`, and which of them are any."""
        pairs = zip(self.prompts.tolist(), self.positions.tolist(), strict=True)
        starts = torch.tensor([[window.start(*pair)] for pair in pairs], device=self.positions.device)
        positions = self.positions[:, None]
        recent = starts + torch.arange(max(0, int((positions - starts).max()) + 1), device=starts.device)
        sinks = torch.arange(window.sinks, device=starts.device).expand(len(starts), -1)
        places = torch.cat([sinks, recent], dim=1)
        return self.slots(places[:, None]), (places <= positions)[:, None]

    def everything(self) -> tuple[Tensor, Tensor]:
        """All entries, likewise."""
        places = torch.arange(int(self.positions.max()) + 1, device=self.positions.device)
        places = places.expand(len(self.positions), 1, -1)
        return self.slots(places), places <= self.positions[:, None, None]

    def attend(self, query: Tensor, paged: Paged, read: tuple[Tensor, Tensor], scaling: float) -> Tensor:
        """Attention of these tokens `[steps, heads, dim]`.

        Args:
            query: likewise.
            paged: the entries.
            read: slots of those that are read, and which of them are any.
            scaling: factor on the logits.
        """
        slots, valid = read
        key, value = paged.read(slots)
        places = torch.arange(key.shape[2], device=key.device).expand(key.shape[:3]).masked_fill(~valid, -1)
        return ops.attention_decode_sparse(query[:, :, None], key, value, places, 1, scaling)[:, :, 0]
