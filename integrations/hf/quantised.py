"""A cache layer that holds the oldest entries of every row in few bits, and shows attention what is read of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmcompress.integrations.hf.cache import PrunedDynamicLayer
from mmcompress.kv_policy import Block, Packed, Quantiser
from mmcompress.policies._rotary import rotate, unrotate

Rotary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Strand:
    """Keys or values of one row, without padding.

    Args:
        exact: `[kv_heads, tokens, dim]`, those in full: the sinks, and behind them the ones that are not packed yet.
        sinks: so many of the first tokens are never packed.
        packed: those between, in the order of their tokens.
    """

    exact: Tensor
    sinks: int
    packed: tuple[Packed, ...] = ()

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.exact.shape[1] + sum(packed.tokens for packed in self.packed)

    @property
    def waiting(self) -> int:
        """How many tokens are not packed yet."""
        return max(self.exact.shape[1] - self.sinks, 0)

    @property
    def parts(self) -> Iterator[Tensor]:
        """All tensors that are held."""
        yield self.exact
        for packed in self.packed:
            yield from packed.parts

    def append(self, states: Tensor) -> Strand:
        """With `states` `[kv_heads, tokens, dim]` of tokens that follow."""
        return replace(self, exact=torch.cat([self.exact, states], dim=1))

    def crop(self, tokens: int) -> Strand:
        """All but the last `tokens`, of which none is packed."""
        return replace(self, exact=self.exact[:, : self.exact.shape[1] - tokens].clone())

    def pack(self, tokens: int, pack: Callable[[Tensor], Packed]) -> Strand:
        """With the oldest `tokens` of those that wait packed."""
        if not tokens:
            return self
        first, due, rest = self.exact.split([self.sinks, tokens, self.waiting - tokens], dim=1)
        packed = pack(due)
        if self.packed and packed.along:
            *before, last = self.packed
            return Strand(torch.cat([first, rest], dim=1), self.sinks, (*before, last.followed_by(packed)))
        return Strand(torch.cat([first, rest], dim=1), self.sinks, (*self.packed, packed))

    def read(self, unpacked: Sequence[Tensor]) -> Tensor:
        """All of it `[kv_heads, tokens, dim]`, given what was packed."""
        return torch.cat([self.exact[:, : self.sinks], *unpacked, self.exact[:, self.sinks :]], dim=1)


@dataclass(frozen=True)
class Row:
    """What a layer holds of one row of a batch.

    Args:
        keys: rotated where they are held in full.
        values: of the same tokens.
        ids: `[..., 1 or kv_heads, tokens]`, their positions, three rows of them under M-RoPE; None where keys are
            packed as rotated.
    """

    keys: Strand
    values: Strand
    ids: Tensor | None = None

    @property
    def parts(self) -> Iterator[Tensor]:
        """All tensors that are held."""
        yield from self.keys.parts
        yield from self.values.parts
        if self.ids is not None:
            yield self.ids

    @property
    def loose(self) -> int | None:
        """How many of the last tokens are packed neither as keys nor as values; None if none is packed."""
        waiting = [strand.waiting for strand in (self.keys, self.values) if strand.packed]
        return min(waiting) if waiting else None

    def crop(self, tokens: int) -> Row:
        """All but the last `tokens`, of which none is packed."""
        ids = None if self.ids is None else self.ids[..., : self.ids.shape[-1] - tokens].clone()
        return Row(self.keys.crop(tokens), self.values.crop(tokens), ids)


@dataclass(frozen=True)
class Arrival:
    """What the newest columns of a layer are.

    Args:
        valid: `[batch, columns]` bool, which are no padding.
        whole: which rows have none, known once for all layers, as the host waits to learn it.
        prompt: whether they bring a prompt, or a part of one.
        ids: by row, see `Row.ids`; None where they are not needed.
        saliency: by row `[kv_heads, tokens]`, of the tokens not packed yet and the new ones; None if nothing needs it.
    """

    valid: Tensor
    whole: Sequence[bool]
    prompt: bool
    ids: Sequence[Tensor] | None
    saliency: Sequence[Tensor | None]


class QuantisedLayer(PrunedDynamicLayer):
    """A layer made from another by `quantise`.

    Args:
        number: of the layer.
        quantiser: what packs.
        rotary: makes cosines and sines of positions.
        rows: what is held.
        valid: `[batch, columns]` bool, in which columns attention finds it.
        reading: keys and values as attention sees them, from the time they are stored until they are settled; only new
            ones where it reads codes.
        reads_codes: whether attention reads `rows` for itself in this pass.
        generated: how many tokens came behind the prompt.
    """

    number: int
    quantiser: Quantiser
    rotary: Rotary
    rows: tuple[Row, ...] = ()
    valid: Tensor
    reading: tuple[Tensor, Tensor] | None = None
    reads_codes = False
    generated = 0

    @property
    def keys(self) -> Any:
        """What attention reads, made anew where it is not at hand; to be set before it is settled only."""
        return self._read()[0]

    @keys.setter
    def keys(self, keys: Any) -> None:
        self.reading = keys, self._read()[1]

    @property
    def values(self) -> Any:
        """Likewise."""
        return self._read()[1]

    @values.setter
    def values(self, values: Any) -> None:
        self.reading = self._read()[0], values

    @property
    def nbytes(self) -> int:
        """What the layer occupies; rows that are copies of each other share what they hold."""
        held = {id(part): part.nbytes for row in self.rows for part in row.parts}
        return sum(held.values()) + sum(part.nbytes for part in self.reading or ())

    def physical_length(self) -> int:
        """Columns that attention sees."""
        stored = self.valid.shape[1] if self.rows else 0
        if self.reading is None:
            return stored
        return self.reading[0].shape[2] + (stored if self.reads_codes else 0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put keys and values behind the others as they are; returns all that attention does not read in codes."""
        if self.reads_codes:
            self.reading = None
        elif self.rows or self.reading is not None:
            keys, values = self._read()
            key_states = torch.cat([keys, key_states], dim=2)
            value_states = torch.cat([values, value_states], dim=2)
        self.reading, self.is_initialized = (key_states, value_states), True
        self.dtype, self.device = key_states.dtype, key_states.device
        self.peak = max(self.peak, self.nbytes)
        return self.reading

    def waiting(self, row: int, valid: Tensor) -> int:
        """How many tokens of a row are not packed yet, `valid` ones of its newest columns included."""
        new = int(valid.sum())
        if not self.rows:
            return max(new - self.quantiser.sinks, 0)
        return max(self.rows[row].keys.waiting, self.rows[row].values.waiting) + new

    def unpacked(self, row: int, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a row that are not packed yet, `valid` ones of its newest columns included."""
        assert self.reading is not None
        new = [states[row, :, -len(valid) :][:, valid] for states in self.reading]
        if not self.rows:
            return new[0], new[1]
        held = self.rows[row]
        return torch.cat([held.keys.exact, new[0]], dim=1), torch.cat([held.values.exact, new[1]], dim=1)

    def settle(self, arrival: Arrival) -> None:
        """Pack what is due, and hold the rest as it is."""
        assert self.reading is not None
        (keys, values), self.reading = self.reading, None
        valid = arrival.valid.to(keys.device)
        self.generated = 0 if arrival.prompt else self.generated + valid.shape[1]
        if not self.rows:
            self.valid = valid
            nothing = Strand(keys.new_zeros(keys.shape[1], 0, keys.shape[3]), self.quantiser.sinks)
            rows = [Row(nothing, nothing)] * len(valid)
        else:
            self.valid, rows = torch.cat([self.valid, valid], dim=1), list(self.rows)
        for number, (row, here) in enumerate(zip(rows, valid, strict=True)):
            new_keys, new_values = (states[number, :, -len(here) :] for states in (keys, values))
            if not arrival.whole[number]:
                new_keys, new_values = new_keys[:, here], new_values[:, here]
            ids = None if arrival.ids is None else arrival.ids[number]
            if row.ids is not None and ids is not None:
                ids = torch.cat([row.ids, ids.expand(*row.ids.shape[:-1], -1)], dim=-1)
            row = Row(row.keys.append(new_keys), row.values.append(new_values), ids)
            rows[number] = self._packed(row, arrival.prompt, arrival.saliency[number])
        self.rows = tuple(rows)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is made before it is stored."""

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last columns off again, of which nothing is packed; see `PrunedCache.crop`."""
        seen = self.get_seq_length()
        gone = -tokens_to_remove if tokens_to_remove <= 0 else max(seen - tokens_to_remove, 0)
        if not gone or not self.physical_length():
            return
        if self.reading is not None:
            keys, values = self.reading
            self.reading = keys[:, :, :-gone], values[:, :, :-gone]
            return
        counts = self.valid[:, -gone:].sum(dim=1).tolist()
        self.rows = tuple(row.crop(count) for row, count in zip(self.rows, counts, strict=True))
        self.valid = self.valid[:, :-gone]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace every row by that of its beam."""
        if self.rows:
            self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row in place."""
        if self.rows:
            self._take(torch.arange(len(self.rows)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows numbered `indices`."""
        if self.rows:
            self._take(torch.arange(len(self.rows))[indices.cpu()])

    def reset(self) -> None:
        """Forget all tokens."""
        self.rows, self.reading, self.generated = (), None, 0
        self.is_initialized, self.dropped, self.peak = False, 0, 0

    def _take(self, numbers: Tensor) -> None:
        self.rows = tuple(self.rows[number] for number in numbers.tolist())
        self.valid = self.valid[numbers.to(self.valid.device)]

    def _packed(self, row: Row, prompt: bool, saliency: Tensor | None) -> Row:
        quantiser, keys, values = self.quantiser, row.keys, row.values

        def block(states: Tensor, waiting: int) -> Block:
            first = None if saliency is None else saliency[:, saliency.shape[1] - waiting :][:, : states.shape[1]]
            return Block(states, self.number, first)

        def pack_keys(states: Tensor) -> Packed:
            if row.ids is not None:
                first = row.ids.shape[-1] - keys.waiting
                rotation = self._rotation(row.ids[..., first : first + states.shape[1]])
                states = unrotate(states.float(), rotation).to(states.dtype)
            return quantiser.pack_keys(block(states, keys.waiting))

        def pack_values(states: Tensor) -> Packed:
            return quantiser.pack_values(block(states, values.waiting))

        keys_due, values_due = quantiser.keys_due(keys.waiting, prompt), quantiser.values_due(values.waiting, prompt)
        return replace(row, keys=keys.pack(keys_due, pack_keys), values=values.pack(values_due, pack_values))

    def _read(self) -> tuple[Tensor, Tensor]:
        if self.reading is not None:
            return self.reading
        keys = _unpacked([row.keys for row in self.rows], self.quantiser.unpack_keys)
        values = _unpacked([row.values for row in self.rows], self.quantiser.unpack_values)
        return (
            self._in_columns([row.keys.read(self._rotated(row, of_row)) for row, of_row in self._with(keys)]),
            self._in_columns([row.values.read(of_row) for row, of_row in self._with(values)]),
        )

    def _with(self, unpacked: Sequence[list[Tensor]]) -> Iterator[tuple[Row, list[Tensor]]]:
        return zip(self.rows, unpacked, strict=True)

    def _rotated(self, row: Row, unpacked: list[Tensor]) -> list[Tensor]:
        if row.ids is None or not unpacked:
            return unpacked
        keys, first = torch.cat(unpacked, dim=1), row.keys.sinks
        rotation = self._rotation(row.ids[..., first : first + keys.shape[1]])
        return [rotate(keys.float(), rotation).to(keys.dtype)]

    def _rotation(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.rotary(torch.zeros(0, device=ids.device), ids)

    def _in_columns(self, rows: Sequence[Tensor]) -> Tensor:
        """`[batch, kv_heads, columns, dim]`, zero where a row is padded."""
        columns = self.valid.shape[1]
        if all(row.shape[1] == columns for row in rows):
            return torch.stack(list(rows))
        padded = rows[0].new_zeros(len(rows), rows[0].shape[0], columns, rows[0].shape[2])
        for states, valid, row in zip(padded, self.valid, rows, strict=True):
            states[:, valid] = row
        return padded


def _unpacked(strands: Sequence[Strand], unpack: Callable[[Packed], Tensor]) -> list[list[Tensor]]:
    """What was packed of each strand, block by block; blocks of equal sizes are read together."""
    alike: dict[Any, list[Packed]] = {}
    for strand in strands:
        for packed in strand.packed:
            alike.setdefault(tuple(part.shape for part in packed.parts), []).append(packed)
    read = {
        id(packed): states
        for blocks in alike.values()
        for packed, states in zip(blocks, unpack(Packed.stack(blocks)), strict=True)
    }
    return [[read[id(packed)] for packed in strand.packed] for strand in strands]


def quantise(layer: PrunedDynamicLayer, number: int, quantiser: Quantiser, rotary: Rotary) -> QuantisedLayer:
    """Turn an empty layer into one that packs, in place."""
    quantised: Any = layer
    quantised.__dict__.pop("keys", None)
    quantised.__dict__.pop("values", None)
    quantised.__class__ = QuantisedLayer
    quantised.number, quantised.quantiser, quantised.rotary = number, quantiser, rotary
    return quantised
