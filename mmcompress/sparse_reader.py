"""The base class of KV policies that evict nothing, but read only a part of the cache in every step of decoding."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from mmcompress import ops
from mmcompress.kv_policy import KVPolicy
from mmcompress.llm_method import LLMFacts


class Duty(NamedTuple):
    """What a layer does in a step.

    Args:
        reads_all: whether it reads everything.
        chooses: whether it chooses what is read, by itself and the layers behind it that do not choose.
    """

    reads_all: bool
    chooses: bool


@dataclass(frozen=True)
class Entries:
    """Where the entries of every row are among the columns of a layer's cache; the other columns are padding.

    Args:
        valid: `[batch, columns]` bool, which columns are entries.
    """

    valid: Tensor

    @cached_property
    def held(self) -> list[int]:
        """How many entries each row has."""
        counts: list[int] = self.valid.sum(dim=1).tolist()
        return counts

    @cached_property
    def number(self) -> Tensor:
        """`[batch, columns]`, how many entries of its row are before each column."""
        return self.valid.cumsum(dim=1) - self.valid.long()

    @cached_property
    def column(self) -> Tensor:
        """`[batch, columns]`, the column of each entry; behind a row's last entry come those of its padding."""
        return (~self.valid).long().argsort(dim=1, stable=True)

    @cached_property
    def newest(self) -> Tensor:
        """`[batch]`, the number of each row's last entry."""
        return (self.valid.sum(dim=1) - 1).clamp(min=0)


class Summary(Protocol):
    """What a policy keeps of a layer's keys from step to step; it is kept with the cache."""

    def take(self, rows: Tensor) -> Self:
        """Only the rows numbered `rows`."""


@dataclass(frozen=True)
class Step:
    """One token of every row in one layer, about to read what is held, its own entry included.

    Args:
        query: `[batch, heads, dim]`, rotated to positions.
        key: `[batch, kv_heads, columns, dim]`, likewise.
        entries: which columns hold an entry.
        keep: how many entries each row may read per KV head, at most as many as it has.
        summary: what `SparseReader.summarise` said of the keys; None if nothing.
    """

    query: Tensor
    key: Tensor
    entries: Entries
    keep: Sequence[int]
    summary: Summary | None = None

    @property
    def grouped(self) -> Tensor:
        """`query` by the KV heads that are shared (GQA) `[batch, kv_heads, group, dim]`."""
        return self.query.unflatten(1, (self.key.shape[1], -1))


@dataclass(frozen=True)
class Reading:
    """What is read.

    Args:
        columns: `[batch, heads, read]`, where the entries are, for each KV head, or for each query head.
        valid: likewise bool; rows and heads that read fewer entries are filled up with others.
    """

    columns: Tensor
    valid: Tensor

    def to(self, device: torch.device) -> Reading:
        """The same on `device`."""
        return Reading(self.columns.to(device), self.valid.to(device))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of one token to what is read `[batch, heads, dim]`.

        Args:
            query: `[batch, heads, dim]`.
            key: `[batch, kv_heads, columns, dim]`.
            value: likewise.
            scaling: factor on the logits.
        """
        entries = self.columns.masked_fill(~self.valid, -1)
        copies = self.columns.shape[1] // key.shape[1]
        heads = query.unflatten(1, (self.columns.shape[1], -1))
        # Query heads that choose for themselves share keys: those that are the n-th of each KV head read together.
        outputs = [
            ops.attention_decode_sparse(
                heads[:, copy::copies].flatten(1, 2)[:, :, None], key, value, entries[:, copy::copies], 1, scaling
            )
            for copy in range(copies)
        ]
        return torch.stack(outputs, dim=2).view(query.shape)


@dataclass(frozen=True)
class SparseReader(KVPolicy):
    """Chooses in every step which entries are read, the newest always among them.

    Args:
        compat: "official" chooses as the authors' code does: for every query head by itself, so that a KV head that
            several share reads more, and without regard to the newest entry.
    """

    compat: Literal["none", "official"] = "none"

    @abstractmethod
    def duties(self, llm: LLMFacts) -> list[Duty]:
        """What each layer does.

        Raises:
            SpecError: the layers asked for do not fit the model.
        """

    def summarise(self, before: Summary | None, key: Tensor, entries: Entries) -> Summary | None:
        """What is to be kept of the keys, made of what was kept `before` and the keys it does not cover yet.

        Args:
            before: may be changed; None if nothing was kept so far.
            key: `[batch, kv_heads, columns, dim]`, all keys, the last ones new.
            entries: which columns hold an entry.
        """
        return None

    @abstractmethod
    def choose(self, step: Step) -> Reading:
        """What is read."""

    def best(self, scores: Tensor, newest: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The candidates with the highest scores, of equal ones the earlier.

        Args:
            scores: `[batch, kv_heads, group, candidates]`, -inf where there is none.
            newest: `[batch]`, the candidate that is always among them.
            counts: how many are wanted of each row.

        Returns:
            Their numbers `[batch, heads, most]`, and which of these are wanted, where others want fewer.
        """
        if self.compat == "official":
            scores = scores.flatten(1, 2)
        else:
            scores = scores.amax(dim=2)
            scores = scores.scatter(2, newest[:, None, None].expand(-1, scores.shape[1], 1), torch.inf)
        ranked = scores.argsort(dim=2, descending=True, stable=True)[..., : max(counts)]
        wanted = torch.tensor(counts, device=scores.device)[:, None, None]
        return ranked, (torch.arange(ranked.shape[2], device=scores.device) < wanted).expand_as(ranked)
