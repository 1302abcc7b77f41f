"""What the tests of all methods cannot know of those inside the LLM: schedules, and scores by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcompress.errors import SpecError
from mmcompress.llm_method import LLMFacts, LLMMethod, PromptRow, RowAttention
from mmcompress.registry import METHODS
from mmcompress.spec import Spec

PROGRESSIVE = ["pyramiddrop", "transprune"]


def build(text: str) -> Any:
    spec = Spec.parse(text)
    return METHODS.build(spec.name, spec.options)


def plan(text: str, tokens: int, keep: float, llm: LLMFacts) -> list[int]:
    method: LLMMethod = build(text)
    return method.plan(tokens, max(1, math.floor(keep * tokens + 1e-9)), keep, llm)


@pytest.mark.parametrize(
    ("method", "depth", "layers", "observed"),
    [
        ("pyramiddrop", 32, (8, 16, 24), ()),
        ("pyramiddrop", 28, (7, 14, 21), ()),
        ("pyramiddrop", 4, (1, 2, 3), ()),
        ("transprune", 32, (7, 9, 12), range(6, 12)),
        ("transprune", 40, (9, 11, 15), range(8, 15)),
        ("transprune", 6, (1, 2, 3), range(3)),
        ("transprune", 4, (1, 2, 3), range(3)),
        ("transprune(prune_layers=[3, 5, 6])", 8, (3, 5, 6), range(2, 6)),
        ("transprune(prune_layers=[2])", 4, (2,), (1,)),
    ],
)
def test_where(method: str, depth: int, layers: tuple[int, ...], observed: Any) -> None:
    llm = LLMFacts(depth, 4)
    configured = build(method)
    assert configured.layers(llm) == layers
    assert configured.needs(llm).transitions == tuple(observed)
    assert configured.needs(llm).upcoming and configured.positions == "renumber"


@pytest.mark.parametrize("method", PROGRESSIVE)
def test_too_shallow(method: str) -> None:
    with pytest.raises(SpecError, match="before 3 layers, but the LLM has 3"):
        build(method).layers(LLMFacts(3, 4))


@pytest.mark.parametrize(
    ("method", "tokens", "keep", "lefts"),
    [
        ("pyramiddrop", 576, 0.125, [288, 144, 72]),
        ("pyramiddrop", 577, 0.125, [288, 144, 72]),
        ("pyramiddrop", 100, 1.0, [100, 100, 100]),
        ("pyramiddrop", 3, 0.1, [1, 1, 1]),
        ("pyramiddrop", 1, 0.5, [1, 1, 1]),
        ("pyramiddrop(prune_layers=[2, 4])", 100, 0.25, [50, 25]),
        ("pyramiddrop(prune_layers=[2])", 100, 0.29, [29]),
        ("transprune", 576, 0.125, [504, 360, 72]),
        ("transprune", 581, 0.125, [508, 363, 72]),
        ("transprune", 100, 1.0, [100, 100, 100]),
        ("transprune", 3, 0.1, [2, 1, 1]),
        ("transprune", 1, 0.5, [1, 1, 1]),
        ("transprune(prune_layers=[2])", 100, 0.29, [29]),
        ("transprune(prune_layers=[2, 3])", 100, 0.25, [75, 25]),
        ("transprune(ratios=[0.7, 0.4])", 576, 0.08, [403, 230, 46]),
        ("transprune(ratios=[0.57, 0.29])", 100, 0.1, [57, 29, 10]),
        ("transprune(ratios=[1, 0.5])", 100, 0.1, [100, 50, 10]),
        ("transprune(ratios=[0.7, 0.4])", 100, 0.6, [70, 60, 60]),
        ("transprune(ratios=[0.7, 0.001])", 100, 0.01, [70, 1, 1]),
    ],
)
def test_how_many(method: str, tokens: int, keep: float, lefts: list[int]) -> None:
    assert plan(method, tokens, keep, LLMFacts(32, 4)) == lefts


@pytest.mark.parametrize("method", PROGRESSIVE)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("prune_layers=[]", r"prune_layers=\[\] must ascend from 1"),
        ("prune_layers=[0, 2]", r"prune_layers=\[0, 2\] must ascend from 1"),
        ("prune_layers=[3, 2]", r"prune_layers=\[3, 2\] must ascend"),
        ("prune_layers=[2, 2]", r"prune_layers=\[2, 2\] must ascend"),
        ("prune_layers=2", "prune_layers=2 must be a list of int or None"),
        ("ratios=[0.5]", r"ratios=\[0.5\] must be 2, one for every removal but the last, whose share is keep"),
        ("ratios=[0.5, 0.25, 0.125]", "must be 2, one for every"),
        ("prune_layers=[2], ratios=[0.5]", "must be 0, one for every"),
        ("ratios=[0.25, 0.5]", r"ratios=\[0.25, 0.5\] must descend"),
        ("ratios=[0.5, 0.5]", "must descend"),
        ("ratios=[1.5, 0.5]", r"within \(0, 1\]"),
        ("ratios=[0.5, 0]", r"within \(0, 1\]"),
        ("ratios=[0.5, -1.0]", r"within \(0, 1\]"),
    ],
)
def test_bad_schedules_are_named(method: str, options: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build(f"{method}({options})")


def random_row(seed: int, tokens: int = 12, heads: int = 4, kv_heads: int = 2) -> PromptRow:
    """Text, image, text; keys of an earlier turn in front."""
    generator = torch.Generator().manual_seed(seed)
    visual = torch.zeros(tokens, dtype=torch.bool)
    visual[2:8] = True
    upcoming = RowAttention(
        torch.randn(heads, tokens, 8, generator=generator),
        torch.randn(kv_heads, 3 + tokens, 8, generator=generator),
        0.5,
    )
    hidden = torch.randn(tokens, 16, generator=generator)
    observed = torch.rand(2, tokens, generator=generator)
    return PromptRow(2, 6, visual, ~visual, hidden, torch.arange(tokens), upcoming=upcoming, observed=observed)


def attention_row(row: PromptRow, token: int) -> Tensor:
    """Attention of one token to those of its turn, averaged over heads, one head and key at a time."""
    assert row.upcoming is not None
    query, key = row.upcoming.query, row.upcoming.key
    heads = []
    for head in range(len(query)):
        keys = key[head * len(key) // len(query), : row.upcoming.past + token + 1]
        heads.append((keys @ query[head, token] * row.upcoming.scaling).softmax(dim=0)[row.upcoming.past :])
    return torch.nn.functional.pad(torch.stack(heads).mean(dim=0), (0, len(row.visual) - token - 1))


def test_pyramiddrop_listens_to_the_last_token() -> None:
    for seed in range(10):
        row = random_row(seed)
        best = attention_row(row, 11)[2:8].argsort(descending=True)[:2].sort().values
        assert build("pyramiddrop").select(row, 2).anchor.tolist() == best.tolist()


def test_transprune_adds_shares_of_transition_and_of_attention() -> None:
    for seed in range(10):
        row = random_row(seed)
        assert row.observed is not None
        variation = row.observed[:, 2:8].sum(dim=0)
        guided = torch.stack([attention_row(row, token)[2:8] for token in range(8, 12)]).mean(dim=0)
        score = variation / variation.sum() + guided / guided.sum()
        best = score.argsort(descending=True)[:2].sort().values
        assert build("transprune").select(row, 2).anchor.tolist() == best.tolist()


def test_a_long_question_is_read_in_blocks() -> None:
    row = random_row(0, tokens=200)
    assert row.upcoming is not None
    whole = row.upcoming.rows(row.question).mean(dim=(0, 1))
    torch.testing.assert_close(row.upcoming.mean_row(row.question), whole)


def test_transitions_by_hand() -> None:
    entered = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    left = torch.tensor([[2.0, 0.0], [0.0, -1.0], [3.0, -3.0]])
    gain, cosine = torch.tensor([2.0, 0.5, 3.0]), torch.tensor([1.0, -1.0, 0.0])
    attention = gain * (1 - cosine).softmax(dim=0)
    torch.testing.assert_close(build("transprune").transition(entered, left), attention)
    observed = build("transprune").observe((entered, left), (left, entered))
    torch.testing.assert_close(observed, attention + (1 - cosine).softmax(dim=0) / gain)
    by_paper = gain * (1 - cosine.abs()).softmax(dim=0)
    torch.testing.assert_close(build("transprune(direction=abscos)").transition(entered, left), by_paper)


def test_transitions_are_taken_in_full_precision() -> None:
    entered, left = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    coarse, fine = (
        build("transprune").transition(entered.to(kind), left.to(kind)) for kind in (torch.bfloat16, torch.float32)
    )
    assert torch.equal(coarse, fine)


@pytest.mark.parametrize("method", PROGRESSIVE)
def test_ties_go_to_the_earlier_token(method: str) -> None:
    row = random_row(0)
    assert row.upcoming is not None
    flat = replace(
        row,
        upcoming=RowAttention(torch.zeros_like(row.upcoming.query), row.upcoming.key, 1.0),
        observed=torch.ones(1, 12),
    )
    assert build(method).select(flat, 3).anchor.tolist() == [0, 1, 2]
