"""Policies that read a part: what all of them owe, and what each of them reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcompress.errors import SpecError
from mmcompress.llm_method import LLMFacts
from mmcompress.registry import POLICIES
from mmcompress.sparse_reader import Entries, Reading, SparseReader, Step

READERS = [name for name in POLICIES.names() if issubclass(POLICIES.get(name), SparseReader)]
SMALL: dict[str, dict[str, Any]] = {"quest": {"page": 4}}
HEADS, GROUP, DIM = 2, 3, 8
HELD = (23, 9, 1, 16)  # entries of each row


def reader(name: str, **options: Any) -> Any:
    """A policy with pages that fit short prompts."""
    return POLICIES.build(name, {**SMALL.get(name, {}), **options})


def padded(held: Sequence[int] = HELD, hole: int = 3) -> Entries:
    """Left-padded rows, all with further padding before their last entry, as a second turn brings it."""
    length = max(held)
    rows = [[False] * (length - count) + [True] * (count - 1) + [False] * hole + [True] for count in held]
    return Entries(torch.tensor(rows))


def states(entries: Entries, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A query, keys and values; those of padding are extreme."""
    generator = torch.Generator().manual_seed(seed)
    batch, columns = entries.valid.shape
    query = torch.randn(batch, HEADS * GROUP, DIM, generator=generator)
    key, value = torch.randn(2, batch, HEADS, columns, DIM, generator=generator)
    padding = ~entries.valid[:, None, :, None]
    return query, key.masked_fill(padding, 1e3), value.masked_fill(padding, 1e3)


def step(policy: SparseReader, entries: Entries, keep: int, seed: int = 0) -> Step:
    """A step with what the policy knows of the keys."""
    query, key, _ = states(entries, seed)
    counts = [min(keep, held) for held in entries.held]
    return Step(query, key, entries, counts, policy.summarise(None, key, entries))


def read(reading: Reading, entries: Entries) -> list[list[list[int]]]:
    """The numbers of the entries that every head of every row reads, ascending."""
    numbers, valid = (
        part[:, None].expand(-1, reading.columns.shape[1], -1).gather(2, reading.columns)
        for part in (entries.number, entries.valid)
    )
    assert valid[reading.valid].all(), "padding is read"
    return [
        [sorted(head[wanted].tolist()) for head, wanted in zip(*parts, strict=True)]
        for parts in zip(numbers, reading.valid, strict=True)
    ]


@pytest.mark.parametrize("compat", ["none", "official"])
@pytest.mark.parametrize("name", READERS)
def test_a_budget_for_everything_reads_everything_once(name: str, compat: str) -> None:
    entries, policy = padded(), reader(name, compat=compat)
    for row, heads in enumerate(read(policy.choose(step(policy, entries, max(HELD))), entries)):
        assert heads == [list(range(HELD[row]))] * (HEADS * GROUP if compat == "official" else HEADS)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("keep", [1, 4, 7, 20])
def test_the_budget_is_not_exceeded_and_the_newest_is_read(name: str, keep: int) -> None:
    entries, policy = padded(), reader(name)
    for seed in range(20):
        for held, heads in zip(HELD, read(policy.choose(step(policy, entries, keep, seed)), entries), strict=True):
            for numbers in heads:
                assert held - 1 in numbers and len(set(numbers)) == len(numbers)
                assert len(numbers) <= max(keep, getattr(policy, "page", 1))


@pytest.mark.parametrize("name", READERS)
def test_the_published_choice_may_miss_the_newest(name: str) -> None:
    entries, policy = padded((40,)), reader(name, compat="official")
    readings = [read(policy.choose(step(policy, entries, 8, seed)), entries)[0] for seed in range(20)]
    assert any(39 not in head for heads in readings for head in heads)
    assert any(len({tuple(head) for head in heads}) > HEADS for heads in readings), "query heads choose by themselves"


@pytest.mark.parametrize("compat", ["none", "official"])
@pytest.mark.parametrize("name", READERS)
def test_neighbours_and_padding_change_nothing(name: str, compat: str) -> None:
    entries, policy = padded(), reader(name, compat=compat)
    together = step(policy, entries, 8)
    choices = read(policy.choose(together), entries)
    for row, held in enumerate(HELD):
        key = together.key[row : row + 1, :, entries.valid[row]]
        alone = Entries(torch.ones(1, held, dtype=torch.bool))
        summary = policy.summarise(None, key, alone)
        choice = policy.choose(Step(together.query[row : row + 1], key, alone, [min(8, held)], summary))
        assert read(choice, alone)[0] == choices[row]


@pytest.mark.parametrize("compat", ["none", "official"])
@pytest.mark.parametrize("name", READERS)
def test_attention_is_softmax_over_what_is_read(name: str, compat: str) -> None:
    entries, policy = padded(), reader(name, compat=compat)
    query, key, value = states(entries)
    reading = policy.choose(step(policy, entries, 8))
    output = reading.attend(query, key, value, 0.3)
    for row, heads in enumerate(read(reading, entries)):
        for head in range(HEADS * GROUP):
            kv_head = head // GROUP
            columns = entries.valid[row].nonzero()[:, 0][heads[head if compat == "official" else kv_head]]
            weights = (key[row, kv_head, columns] @ query[row, head] * 0.3).softmax(0)
            torch.testing.assert_close(output[row, head], weights @ value[row, kv_head, columns])


@pytest.mark.parametrize("page", [1, 4, 16])
def test_bounds_are_those_of_pages_counted_without_padding(page: int) -> None:
    entries, policy = padded(), reader("quest", page=page)
    for seed in range(10):
        now = step(policy, entries, 8, seed)
        bounds, pages = policy.bounds(now), now.summary
        for row, held in enumerate(HELD):
            keys = now.key[row, :, entries.valid[row]].split(page, dim=1)
            assert bounds[row].isfinite().all(dim=(0, 1)).tolist() == [n < len(keys) for n in range(bounds.shape[3])]
            for number, part in enumerate(keys):
                assert torch.equal(pages.low[row, :, number], part.amin(1))
                assert torch.equal(pages.high[row, :, number], part.amax(1))
                logits = now.grouped[row] @ part.mT
                assert (bounds[row, :, :, number] >= logits.amax(2) - 1e-5).all()
            if page == 1:
                expected = torch.cat([now.grouped[row] @ part.mT for part in keys], dim=2)
                torch.testing.assert_close(bounds[row, :, :, :held], expected)


def test_bounds_grow_with_new_keys_alone() -> None:
    """Keys that are covered are never looked at again: NaN in their place changes nothing."""
    entries, policy = padded((37, 30, 22)), reader("quest")
    _, key, _ = states(entries)
    whole, pages = policy.summarise(None, key, entries), None
    for end in (20, 21, 22, 29, *range(30, key.shape[2] + 1)):
        covered = 0 if pages is None else pages.columns
        new = torch.cat([torch.full_like(key[:, :, :covered], torch.nan), key[:, :, covered:end]], dim=2)
        pages = policy.summarise(pages, new, Entries(entries.valid[:, :end]))
    assert pages.columns == key.shape[2]
    assert torch.equal(pages.low, whole.low) and torch.equal(pages.high, whole.high)
    rows = torch.tensor([2, 0, 0])
    moved = policy.summarise(pages.take(rows), key[rows], Entries(entries.valid[rows]))
    assert torch.equal(moved.low, whole.low[rows]) and torch.equal(moved.high, whole.high[rows])
    longer = reader("quest", page=8)
    assert torch.equal(longer.summarise(whole, key, entries).low, longer.summarise(None, key, entries).low)


def test_quest_by_hand() -> None:
    """Pages of two: bounds for the query (1, -1) are 2, 6, 5, 1 and that of the newest, alone on its page, -9."""
    key = torch.tensor([[2, 1], [1, 0], [3, 2], [0, -3], [5, 0], [4, 4], [1, 0], [1, 1], [0, 9]]).float()
    entries = Entries(torch.ones(1, 9, dtype=torch.bool))
    policy, query = reader("quest", page=2), torch.tensor([[[1.0, -1.0]]])
    summary = policy.summarise(None, key[None, None], entries)

    def chosen(keep: int, compat: str = "none") -> list[int]:
        asked = reader("quest", page=2, compat=compat)
        return read(asked.choose(Step(query, key[None, None], entries, [keep], summary)), entries)[0][0]

    now = Step(query, key[None, None], entries, [9], summary)
    assert policy.bounds(now).flatten().tolist() == [2, 6, 5, 1, -9]
    assert chosen(1) == chosen(3) == [8]
    assert chosen(4) == chosen(5) == [2, 3, 8]
    assert chosen(6) == [2, 3, 4, 5, 8]
    assert chosen(8) == [0, 1, 2, 3, 4, 5, 8] and chosen(9) == list(range(9))
    assert chosen(1, "official") == chosen(7, "official") == [0, 1, 2, 3, 4, 5]


def test_tidaldecode_by_hand() -> None:
    """One set for the query heads of a KV head, by the higher of their logits; of equal ones the earlier."""
    key = torch.tensor([[4, 0], [1, 1], [0, 3], [1, 2], [2, 1], [0, 0]]).float()[None, None]
    entries = Entries(torch.ones(1, 6, dtype=torch.bool))
    query = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])

    def chosen(keep: int, compat: str = "none") -> list[list[int]]:
        return read(reader("tidaldecode", compat=compat).choose(Step(query, key, entries, [keep])), entries)[0]

    assert [chosen(keep) for keep in (1, 2, 3, 4, 5)] == [
        [[5]],
        [[0, 5]],
        [[0, 2, 5]],
        [[0, 2, 3, 5]],
        [[0, 2, 3, 4, 5]],
    ]
    assert chosen(2, "official") == [[0, 4], [2, 3]]


@pytest.mark.parametrize(
    ("name", "options", "layers", "dense", "choosing"),
    [
        ("quest", {}, 6, [0, 1], [2, 3, 4, 5]),
        ("quest", {"dense_layers": 0}, 3, [], [0, 1, 2]),
        ("tidaldecode", {}, 32, [0, 1, 2, 13], [2, 13]),
        ("tidaldecode", {}, 4, [0, 1, 2], [1, 2]),
        ("tidaldecode", {"selection_layers": [0]}, 4, [0], [0]),
        ("tidaldecode", {"selection_layers": (2, 9)}, 16, [0, 1, 2, 9], [2, 9]),
    ],
)
def test_layers(name: str, options: dict[str, Any], layers: int, dense: list[int], choosing: list[int]) -> None:
    duties = reader(name, **options).duties(LLMFacts(layers, 4))
    assert [layer for layer, duty in enumerate(duties) if duty.reads_all] == dense
    assert [layer for layer, duty in enumerate(duties) if duty.chooses] == choosing


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("layers", [8, 28, 32, 80])
def test_nothing_is_read_that_nobody_chose(name: str, layers: int) -> None:
    duties = reader(name).duties(LLMFacts(layers, 4))
    sparse = [layer for layer, duty in enumerate(duties) if not duty.reads_all]
    assert len(sparse) > layers // 2
    assert all(any(duty.chooses for duty in duties[: layer + 1]) for layer in sparse)


@pytest.mark.parametrize(
    ("name", "options", "layers", "message"),
    [
        ("quest", {"page": 0}, 4, "page=0 must be at least 1"),
        ("quest", {"dense_layers": -1}, 4, "at least 0"),
        ("quest", {}, 2, "leaves none"),
        ("tidaldecode", {}, 3, "give selection_layers"),
        ("tidaldecode", {"selection_layers": (3, 2)}, 8, "must ascend"),
        ("tidaldecode", {"selection_layers": ()}, 8, "must ascend"),
        ("tidaldecode", {"selection_layers": (2, 7)}, 8, "no layer behind the last"),
    ],
)
def test_what_makes_no_sense_is_refused(name: str, options: dict[str, Any], layers: int, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        reader(name, **options).duties(LLMFacts(layers, 4))
