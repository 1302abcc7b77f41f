"""The base classes of KV-cache policies: which entries of a layer's cache stay, and in what form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count as count_up
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmcompress import ops
from mmcompress.budget import Budget
from mmcompress.errors import SpecError
from mmcompress.registry import MethodInfo
from mmcompress.types import Positions

Schedule = Literal["prefill", "step"]
Scope = Literal["all", "visual", "text"]
Join = Literal["mean", "sum", "max"]
Rotation = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class KVNeeds:
    """What a policy reads of a layer's attention beside keys and values; nothing of it is an attention map.

    Args:
        queries: how many of the prompt's last queries, or those of the text behind the last visual token, at least one.
        unrotated: whether these are wanted as they are before rotation.
        steps: whether the query of every later token is read too.
        masses: whether a layer's budget depends on `Evictor.mass` of all layers, so that entries go behind the last.
        draft: folder of a smaller model that says how the prompt goes on, so that entries go behind the last layer.
        lookahead: how many tokens it says at most.
    """

    queries: int | Literal["all", "question"] = 0
    unrotated: bool = False
    steps: bool = False
    masses: bool = False
    draft: str | None = None
    lookahead: int = 0


class Ahead(NamedTuple):
    """Tokens that a draft expects behind the prompt; the layer asked for them and forgot them again.

    Args:
        query: `[heads, tokens, dim]`, rotated.
        key: `[kv_heads, tokens, dim]`, rotated.
    """

    query: Tensor
    key: Tensor


@dataclass(frozen=True)
class KVRow:
    """What one layer holds of one row of a batch, without padding.

    Args:
        layer: number of the layer.
        layers: how many there are.
        key: `[kv_heads, entries, dim]`, rotated to positions.
        value: likewise.
        place: `[kv_heads, entries]`, which token of the sequence each entry is of, ascending.
        visual: `[kv_heads, entries]` bool, which entries are of visual tokens.
        seen: tokens of the sequence so far; entries of some of them may be gone.
        scaling: factor on the logits.
        generated: how many tokens came behind the prompt.
        query: `[heads, queries, dim]` of the last tokens, whose entries are the last ones, rotated; None unless asked
            for.
        unrotated: the same before rotation, in float32.
        observed: `[kv_heads, entries]`, what `Evictor.observe` said of each entry, summed; None before the first time.
        masses: `[layers]`, what `Evictor.mass` said of each layer; None unless asked for.
        ahead: what a draft expects next; None unless asked for.
        rotation: place -> cosines and sines `[..., dim]` of that position.
    """

    layer: int
    layers: int
    key: Tensor
    value: Tensor
    place: Tensor
    visual: Tensor
    seen: int
    scaling: float
    generated: int = 0
    query: Tensor | None = None
    unrotated: Tensor | None = None
    observed: Tensor | None = None
    masses: Tensor | None = None
    ahead: Ahead | None = None
    rotation: Rotation | None = None

    @property
    def entries(self) -> int:
        """How many are held per KV head."""
        return self.key.shape[1]

    @property
    def last_seen(self) -> Tensor:
        """The last entry that each query sees `[queries]`."""
        assert self.query is not None
        return torch.arange(self.entries - self.query.shape[1], self.entries, device=self.key.device)

    def rows(self, heads: Join | None = None, rows: Join | None = None, last: int | None = None) -> Tensor:
        """Causal softmax rows of `query`, float32 `[heads, rows, entries]`; over what is joined they are one.

        Args:
            heads: how heads are joined; not if it is None.
            rows: likewise rows, behind heads.
            last: only so many of the last rows; all if it is None.
        """
        assert self.query is not None
        first = 0 if last is None else max(0, self.query.shape[1] - last)
        query, last_seen = self.query[None, :, first:], self.last_seen[first:]
        return ops.attention_rows(query, self.key[None], self.scaling, last_seen, heads=heads, rows=rows)[0]

    def column_sums(self) -> Tensor:
        """How much `query` attends to each entry, float32 `[kv_heads, group, entries]`; its rows never exist."""
        assert self.query is not None
        attention = (self.query[None], self.key[None], self.scaling, self.last_seen)
        lse = ops.attention_lse(*attention)
        return self.grouped(ops.weighted_colsum(*attention, lse, torch.ones_like(lse))[0])

    def grouped(self, heads: Tensor) -> Tensor:
        """`[heads, ...]` by the KV heads they share (GQA) `[kv_heads, group, ...]`."""
        return heads.unflatten(0, (len(self.key), -1))


class KVPolicy(ABC):
    """A policy's name and needs. Subclasses are frozen dataclasses whose fields are the options; `keep` never is."""

    info: ClassVar[MethodInfo]

    def needs(self) -> KVNeeds:
        """What is to be observed."""
        return KVNeeds()


@dataclass(frozen=True)
class Evictor(KVPolicy):
    """Scores entries; the lowest ones go.

    Args:
        scope: which entries may go: all, those of visual tokens, or those of text.
        every: steps from one eviction to the next, for policies that go on; in between as many entries more are held.
    """

    scope: Scope = "all"
    every: int = 1

    @property
    def schedule(self) -> Schedule:
        """When entries go: once behind the prompt, or then and again behind every step."""
        return "prefill"

    @property
    def least(self) -> int:
        """How many entries always stay, however long the prompt: sinks, the recent window."""
        return 0

    def require(self, keep: Budget) -> None:
        """Check what no prompt could change.

        Raises:
            SpecError: the budget is smaller than what must stay, or `every` makes no sense.
        """
        if self.every < 1 or (self.every > 1 and self.schedule == "prefill"):
            why = "must be at least 1" if self.every < 1 else "says nothing, as entries go behind the prompt only"
            raise SpecError(f"{self.info.name}: every={self.every} {why}.")
        if isinstance(keep.keep, int) and keep.keep < self.least:
            raise SpecError(
                f"{self.info.name}: {self.least} entries always stay, more than keep={keep.keep}; raise keep or lower "
                f"what stays, see mmcompress info --kv {self.info.name}."
            )

    @property
    def positions(self) -> Positions:
        """Whether what stays keeps its positions; if not, the coming token's is the number of entries held."""
        return "original"

    def capacity(self, keep: Budget, entries: int, scoped: int) -> int:
        """How many entries per head a row may hold; those out of scope stay on top of the budget.

        Args:
            keep: what stays of those in scope.
            entries: of the prompt.
            scoped: how many of them are in scope.
        """
        budget = keep.keep
        stay = budget if isinstance(budget, int) else max(keep.tokens(scoped), min(scoped, self.least))
        return entries - scoped + stay

    def mass(self, row: KVRow) -> Tensor:
        """What this layer's budget is in proportion to, one number, for policies that compare layers."""
        raise NotImplementedError

    def budget(self, row: KVRow, keep: int) -> int:
        """How many entries this layer may hold per head, where all layers together may hold `keep` on average."""
        return keep

    def head_budgets(self, scores: Tensor, stays: Tensor, keep: int) -> list[int]:
        """How many entries each head may hold, those that must stay included, where all may hold `keep` on average.

        Args:
            scores: `[kv_heads, entries]`.
            stays: likewise bool, the entries that must stay, at most `keep` per head.
            keep: fewer than there are entries.
        """
        return [keep] * len(scores)

    def protected(self, row: KVRow, keep: int) -> Tensor:
        """`[kv_heads, entries]` bool, of `keep` entries those that always stay: sinks, the recent window."""
        return torch.zeros_like(row.visual)

    def observe(self, row: KVRow) -> Tensor:
        """What the queries add to what is known of each entry `[kv_heads, entries]`, for policies that keep count."""
        raise NotImplementedError

    @abstractmethod
    def score(self, row: KVRow) -> Tensor:
        """How much each entry is worth keeping, float32 `[kv_heads, entries]`; of no account where it must stay."""

    def select(self, row: KVRow, keep: int) -> list[Tensor]:
        """Per KV head the entries that stay, ascending; of equal ones the earlier.

        Raises:
            SpecError: what must stay exceeds the budget.
        """
        budget = self.budget(row, keep)
        if budget >= row.entries:
            return [torch.arange(row.entries, device=row.key.device)] * len(row.key)
        stays, scores = self._stays(row, keep, budget), self.score(row)
        return self._best(scores, stays, self.head_budgets(scores, stays, budget))

    def select_heads(self, heads: Sequence[KVRow], keep: int) -> list[Tensor]:
        """`select` where the KV heads, each a row of its own, hold different numbers of entries."""
        if keep * len(heads) >= sum(head.entries for head in heads):
            return [torch.arange(head.entries, device=head.key.device) for head in heads]
        scores = pad_sequence([self.score(head)[0] for head in heads], batch_first=True, padding_value=-torch.inf)
        stays = pad_sequence([self._stays(head, keep, keep)[0] for head in heads], batch_first=True)
        budgets = self.head_budgets(scores, stays, keep)
        return self._best(scores, stays, [min(b, head.entries) for b, head in zip(budgets, heads, strict=True)])

    def _stays(self, row: KVRow, keep: int, budget: int) -> Tensor:
        stays = self.protected(row, keep)
        if self.scope != "all":
            stays = stays | (row.visual != (self.scope == "visual"))
        if self.scope == "all" and self.least <= budget:
            return stays  # as many as that at most; to count them the host would wait for the device
        needed = int(stays.sum(dim=1).max())
        if needed > budget:
            raise SpecError(
                f"{self.info.name}: {needed} entries must stay, but layer {row.layer} may hold {budget}; raise keep."
            )
        return stays

    def _best(self, scores: Tensor, stays: Tensor, budgets: Sequence[int]) -> list[Tensor]:
        order = scores.masked_fill(stays, torch.inf).argsort(dim=1, descending=True, stable=True)
        return [ranked[:count].sort().values for ranked, count in zip(order, budgets, strict=True)]

    def hold(self, row: KVRow, kept: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values `[kept, dim]` of what stays, per KV head; policies that merge or move entries do it here."""
        return (
            [key[indices] for key, indices in zip(row.key, kept, strict=True)],
            [value[indices] for value, indices in zip(row.value, kept, strict=True)],
        )


@dataclass(frozen=True)
class Block:
    """Keys or values of tokens that follow each other, about to be packed.

    Args:
        states: `[..., kv_heads, tokens, dim]`; whatever is in front are rows of equal length.
        layer: number of the layer.
        saliency: `[..., kv_heads, tokens]`, what `Quantiser.saliency` said of them; None if nothing.
    """

    states: Tensor
    layer: int = 0
    saliency: Tensor | None = None


@dataclass(frozen=True)
class Packed:
    """Keys or values as they are held.

    Args:
        parts: bit-packed codes, and whatever else is needed to read them: ranges, outliers, indices.
        shape: of what was packed.
        dtype: of what was packed.
        layer: number of the layer.
        along: by part, the dimension in which tokens that are packed later go behind these; empty if they cannot.
    """

    parts: tuple[Tensor, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    layer: int = 0
    along: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        """What it occupies."""
        return sum(part.nbytes for part in self.parts)

    @property
    def tokens(self) -> int:
        """How many were packed."""
        return self.shape[-2]

    @classmethod
    def stack(cls, blocks: Sequence[Packed]) -> Packed:
        """Blocks of a layer whose parts are of equal sizes, as rows of one."""
        if len(blocks) == 1:
            parts = tuple(part[None] for part in blocks[0].parts)
        else:
            parts = tuple(torch.stack(part) for part in zip(*(block.parts for block in blocks), strict=True))
        return replace(blocks[0], parts=parts, shape=(len(blocks), *blocks[0].shape))

    def followed_by(self, later: Packed) -> Packed:
        """Both as if packed at once, for single rows where `along` says how."""
        parts = zip(self.parts, later.parts, self.along, strict=True)
        joined = tuple(torch.cat([part, more], dim) for part, more, dim in parts)
        return replace(self, parts=joined, shape=(*self.shape[:-2], self.tokens + later.tokens, self.shape[-1]))


class Quantiser(KVPolicy):
    """Holds entries in few bits, oldest first; the most recent ones may stay what they are."""

    @property
    def block(self) -> int:
        """So many tokens that were generated are packed at once."""
        return 32

    @property
    def sinks(self) -> int:
        """So many of the first tokens are never packed."""
        return 0

    def require(self, layers: int, kv_heads: int, head_dim: int) -> None:
        """Check, by packing the shortest sequence that is packed at all, that a model's heads can be.

        Raises:
            SpecError: heads of this size do not divide into groups or bytes, or a layer lacks what it needs.
        """
        for layer in range(layers):
            for due, pack in ((self.keys_due, self.pack_keys), (self.values_due, self.pack_values)):
                tokens = next(count for count in (due(2**power, True) for power in count_up()) if count)
                states = torch.zeros(kv_heads, tokens, head_dim)
                pack(Block(states, layer, states[..., 0]))

    @property
    def code_bits(self) -> int | None:
        """Bits of a code where what is packed is what `ops.kv_quant` makes, which attention reads as it is."""
        return None

    @property
    def rotated(self) -> bool:
        """Whether keys are packed as rotated to positions; if not, they are rotated when they are read."""
        return True

    def keys_due(self, held: int, prompt: bool) -> int:
        """How many of the keys that are not packed yet, oldest first, are to be packed now.

        Args:
            held: how many there are, without sinks.
            prompt: whether a prompt, or a part of one, was just read; if not, a token that was generated.
        """
        return held if prompt else held - held % self.block

    def values_due(self, held: int, prompt: bool) -> int:
        """Likewise of the values."""
        return self.keys_due(held, prompt)

    def saliency(self, row: KVRow) -> Tensor | None:
        """How much each entry matters `[kv_heads, entries]`, for policies that spend more bits on some.

        Args:
            row: the entries that are not packed yet, some of them due.
        """
        return None

    @abstractmethod
    def pack_keys(self, block: Block) -> Packed:
        """Keys in few bits.

        Raises:
            SpecError: they do not divide into groups or bytes.
        """

    @abstractmethod
    def pack_values(self, block: Block) -> Packed:
        """Values likewise."""

    @abstractmethod
    def unpack_keys(self, packed: Packed) -> Tensor:
        """What is read of them, in shape and type of what was packed."""

    @abstractmethod
    def unpack_values(self, packed: Packed) -> Tensor:
        """Likewise."""
