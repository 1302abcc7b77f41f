"""The base classes of KV-cache policies: which entries of a layer's cache stay, and in what form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmcompress.errors import SpecError
from mmcompress.registry import MethodInfo

Schedule = Literal["prefill", "step"]
Scope = Literal["all", "visual", "text"]
Rotation = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class KVNeeds:
    """What a policy reads of a layer's attention beside keys and values; nothing of it is an attention map.

    Args:
        queries: how many of the prompt's last queries; None for all of them.
        unrotated: whether these are wanted as they are before rotation.
        steps: whether the query of every later token is read too.
    """

    queries: int | None = 0
    unrotated: bool = False
    steps: bool = False


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
        query: `[heads, queries, dim]` of the last tokens of the sequence, rotated; None unless asked for.
        unrotated: the same before rotation.
        observed: `[kv_heads, entries]`, what `Evictor.observe` said of each entry, summed; None before the first time.
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
    query: Tensor | None = None
    unrotated: Tensor | None = None
    observed: Tensor | None = None
    rotation: Rotation | None = None


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
    """

    scope: Scope = "all"

    @property
    def schedule(self) -> Schedule:
        """When entries go: once behind the prompt, or then and again whenever a step exceeds the budget."""
        return "prefill"

    def budget(self, row: KVRow, keep: int) -> int:
        """How many entries this layer may hold per head, where all layers together may hold `keep` on average."""
        return keep

    def head_budgets(self, scores: Tensor, keep: int) -> Tensor:
        """How many of `[kv_heads, entries]` each head may hold `[kv_heads]`, where they may hold `keep` on average."""
        return torch.full(scores.shape[:1], keep, device=scores.device)

    def protected(self, row: KVRow) -> Tensor:
        """`[kv_heads, entries]` bool, entries that always stay: sinks, the recent window."""
        return torch.zeros_like(row.visual)

    def observe(self, row: KVRow) -> Tensor:
        """What the queries add to what is known of each entry `[kv_heads, entries]`, for policies that keep count."""
        raise NotImplementedError

    @abstractmethod
    def score(self, row: KVRow) -> Tensor:
        """How much each entry is worth keeping, float32 `[kv_heads, entries]`."""

    def select(self, row: KVRow, keep: int) -> list[Tensor]:
        """Per KV head the entries that stay, ascending; of equal ones the earlier.

        Raises:
            SpecError: what must stay exceeds the budget.
        """
        scores = self.score(row)
        stays = self.protected(row)
        if self.scope != "all":
            stays = stays | (row.visual != (self.scope == "visual"))
        budgets = self.head_budgets(scores, min(self.budget(row, keep), scores.shape[1]))
        if bool((stays.sum(dim=1) > budgets).any()):
            raise SpecError(
                f"{self.info.name}: {int(stays.sum(dim=1).max())} entries must stay; keep={keep} is too few."
            )
        order = scores.masked_fill(stays, torch.inf).argsort(dim=1, descending=True, stable=True)
        return [row[:count].sort().values for row, count in zip(order, budgets.tolist(), strict=True)]


@dataclass(frozen=True)
class Packed:
    """Keys or values as they are held.

    Args:
        codes: bit-packed, uint8.
        parts: everything else that `Quantiser.unpack_*` needs: scales, offsets, outliers, indices.
        shape: of what was packed.
        dtype: of what was packed.
    """

    codes: Tensor
    parts: tuple[Tensor, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """What it occupies."""
        return sum(part.numel() * part.element_size() for part in (self.codes, *self.parts))


class Quantiser(KVPolicy):
    """Holds entries in few bits, all but the most recent ones."""

    @property
    @abstractmethod
    def block(self) -> int:
        """Entries are packed so many at once, as soon as there are as many behind `residual`."""

    @property
    @abstractmethod
    def residual(self) -> int:
        """So many recent entries at least are held as they are."""

    @abstractmethod
    def pack_keys(self, key: Tensor) -> Packed:
        """`[batch, kv_heads, block, dim]` in few bits.

        Raises:
            SpecError: they do not divide into groups or bytes.
        """

    @abstractmethod
    def pack_values(self, value: Tensor) -> Packed:
        """Likewise."""

    @abstractmethod
    def unpack_keys(self, packed: Packed) -> Tensor:
        """What is read of them, in shape and type of what was packed."""

    @abstractmethod
    def unpack_values(self, packed: Packed) -> Tensor:
        """Likewise."""
