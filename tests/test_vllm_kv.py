"""What KV policies leave and read of vLLM's blocks, told without vLLM: as much as in transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmcompress.budget import Budget
from mmcompress.integrations.vllm.kv.page_reader import PageReader
from mmcompress.integrations.vllm.kv.paged import Chunk, Paged, Steps, slots_of
from mmcompress.integrations.vllm.kv.plan import KVPlan, Window
from mmcompress.kv_policy import KVRow
from mmcompress.policies.quest import Quest
from mmcompress.policies.streamingllm import StreamingLLM
from mmcompress.sparse_reader import Entries, Step
from mmcompress.spec import CompressionConfig

HEADS, KV_HEADS, DIM, BLOCK, BLOCKS = 4, 2, 8, 32, 9
LENGTHS, PROMPTS = (70, 33, 5), (40, 33, 2)
"""Of three requests, of which the second is a prompt alone."""
SCALING = 0.3


def row(place: Tensor) -> KVRow:
    """A row of a layer that holds the tokens `place`."""
    states = torch.zeros(1, len(place), 1)
    visual = torch.zeros(1, len(place), dtype=torch.bool)
    return KVRow(0, 1, states, states, place[None], visual, int(place[-1]) + 1, 1.0)


@pytest.mark.parametrize("keep", [6, 12, 0.5, 1.0])
@pytest.mark.parametrize(("sinks", "every"), [(4, 1), (0, 1), (1, 3), (5, 7)])
def test_windows_are_what_the_policy_selects(sinks: int, every: int, keep: int | float) -> None:
    policy, prompt = StreamingLLM(sinks=sinks, every=every), 20
    window = Window(policy, Budget(keep))
    capacity = policy.capacity(window.keep, prompt, prompt)
    (held,) = policy.select(row(torch.arange(prompt)), capacity)
    for position in range(prompt, 60):
        start = window.start(prompt, position)
        assert held.tolist() == [place for place in range(position) if place < sinks or place >= start]
        held = torch.cat([held, torch.tensor([position])])
        if (position - prompt + 1) % every == 0:
            held = held[policy.select(row(held), capacity)[0]] if len(held) > capacity else held
        assert len(held) <= max(window.most, capacity + every)


@pytest.fixture
def requests() -> tuple[list[tuple[Tensor, Tensor]], Paged, Tensor]:
    """Keys and values `[kv_heads, tokens, dim]` of three requests, the same in blocks, and their tables of blocks."""
    torch.manual_seed(0)
    paged = Paged(torch.full((BLOCKS, KV_HEADS, BLOCK, 2 * DIM), torch.nan))  # what nobody stored nobody may read
    states, tables, free = [], [], torch.randperm(BLOCKS).tolist()
    for length in LENGTHS:
        key, value = torch.randn(2, KV_HEADS, length, DIM)
        blocks = torch.tensor([free.pop() for _ in range(-(-length // BLOCK))])
        places = torch.arange(length)
        paged.store(key.transpose(0, 1), value.transpose(0, 1), slots_of(blocks, places, BLOCK))
        states.append((key, value))
        tables.append(blocks)
    return states, paged, torch.nn.utils.rnn.pad_sequence(tables, batch_first=True)


def reference(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """Attention of `[tokens, heads, dim]` to what is `seen` `[tokens, heads or 1, entries]`."""
    key, value = (part.repeat_interleave(HEADS // KV_HEADS, dim=0) for part in (key, value))
    logits = torch.einsum("thd,hkd->thk", query, key) * SCALING
    return torch.einsum("thk,hkd->thd", logits.masked_fill(~seen, -torch.inf).softmax(-1), value)


def steps_of(table: Tensor) -> Steps:
    """Every token behind its prompt."""
    behind = [(r, p) for r, (n, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)) for p in range(prompt, n)]
    rows, positions = torch.tensor(behind).T
    return Steps(torch.arange(len(rows)), table[rows], positions, torch.tensor(PROMPTS)[rows], BLOCK)


def test_prompts_see_all_that_is_before_them(requests: tuple[list[tuple[Tensor, Tensor]], Paged, Tensor]) -> None:
    states, paged, table = requests
    query, places = torch.randn(6, HEADS, DIM), torch.arange(34)
    chunk = Chunk(slice(0, 6), slots_of(table[0], places, BLOCK))
    seen = places <= torch.arange(28, 34)[:, None, None]
    key, value = (part[:, :34] for part in states[0])
    torch.testing.assert_close(chunk.attend(query, paged, SCALING), reference(query, key, value, seen))


def test_windows_are_read(requests: tuple[list[tuple[Tensor, Tensor]], Paged, Tensor]) -> None:
    states, paged, table = requests
    steps, window = steps_of(table), Window(StreamingLLM(sinks=3), Budget(9))
    query = torch.randn(len(steps.tokens), HEADS, DIM)
    output = steps.attend(query, paged, steps.within(window), SCALING)
    whole = steps.attend(query, paged, steps.everything(), SCALING)
    for number, (position, prompt) in enumerate(zip(steps.positions.tolist(), steps.prompts.tolist(), strict=True)):
        key, value = states[LENGTHS.index({40: 70, 2: 5}[prompt])]
        places = torch.arange(position + 1)
        seen = (places < 3) | (places >= window.start(prompt, position))
        for read, expected in ((output, seen), (whole, torch.ones_like(seen))):
            asked = query[number : number + 1]
            wanted = reference(asked, key[:, : position + 1], value[:, : position + 1], expected[None, None])
            torch.testing.assert_close(read[number : number + 1], wanted)


@pytest.mark.parametrize("page", [4, 16])
def test_pages_are_those_of_quest(requests: tuple[list[tuple[Tensor, Tensor]], Paged, Tensor], page: int) -> None:
    states, paged, table = requests
    policy, keep = Quest(page=page), Budget(0.5)
    reader = PageReader(policy, keep, paged.cache)
    for turn in range(2):  # in the second, blocks hold another request's keys than before
        for (key, _), blocks in zip(states, table, strict=True):
            places = torch.arange(key.shape[1])
            slots = slots_of(blocks, places, BLOCK)
            noted = key.transpose(0, 1) if turn else 100 * key.transpose(0, 1)
            for part in places.split(7):
                reader.take_in(noted[part], slots[part])
    lengths = torch.tensor(LENGTHS)
    steps = Steps(torch.arange(3), table, lengths - 1, torch.tensor(PROMPTS), BLOCK)
    query = torch.randn(3, HEADS, DIM)
    slots, valid = reader.choose(query, steps)
    for number, ((key, _), blocks) in enumerate(zip(states, table, strict=True)):
        entries = Entries(torch.ones(1, key.shape[1], dtype=torch.bool))
        summary = policy.summarise(None, key[None], entries)
        budget = [keep.tokens(key.shape[1])]
        reading = policy.choose(Step(query[number : number + 1], key[None], entries, budget, summary))
        for head in range(KV_HEADS):
            places = reading.columns[0, head][reading.valid[0, head]]
            expected = slots_of(blocks, places, BLOCK)
            assert slots[number, head][valid[number, head]].tolist() == expected.tolist()


def test_plans_say_how_much_stays() -> None:
    def plan(kv: str) -> KVPlan:
        found = KVPlan.of(CompressionConfig.create(kv=kv))
        assert found is not None
        return found

    assert KVPlan.of(CompressionConfig.create("random", keep=0.5)) is None
    assert plan("streamingllm(keep=64)").entries(20) == 20
    assert plan("streamingllm(keep=64)").entries(200) == 64
    assert plan("quest(keep=0.5)").entries(200) == 100
    assert plan("quest(keep=0.5)").window is None
