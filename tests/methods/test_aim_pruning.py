"""AIM's pruning against a plain PageRank, and where it removes how much."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmcompress.errors import SpecError
from mmcompress.llm_method import LLMFacts, PromptRow, RowAttention
from mmcompress.methods.aim_pruning import AIMPruning, importance


def attention(tokens: int, past: int = 0, seed: int = 0) -> RowAttention:
    """Four heads, of which two share their keys."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(4, tokens, 5, generator=generator)
    return RowAttention(query, torch.randn(2, past + tokens, 5, generator=generator), 0.3)


def by_hand(row: RowAttention, gone: tuple[int, ...] = ()) -> Tensor:
    heads, tokens, _ = row.query.shape
    squares = [0.0] * tokens
    for head in range(heads):
        rank = [1 / tokens] * tokens
        for _ in range(5):
            received = [0.0] * tokens
            for i in range(tokens):
                seen = [j for j in range(row.past + i + 1) if j - row.past not in gone]
                logits = [float(row.query[head, i] @ row.key[head // 2, j]) * row.scaling / 0.1 for j in seen]
                odds = [math.exp(logit - max(logits)) for logit in logits]
                for j, odd in zip(seen, odds, strict=True):
                    if j >= row.past:
                        received[j - row.past] += rank[i] * odd / sum(odds)
            rank = received
        squares = [square + value**2 for square, value in zip(squares, rank, strict=True)]
    return torch.tensor(squares).div(heads).sqrt()


@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("tokens", [1, 2, 13])
def test_pagerank(tokens: int, past: int) -> None:
    row = attention(tokens, past)
    torch.testing.assert_close(importance(row), by_hand(row), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("past", [0, 4])
def test_what_is_only_masked_still_votes(past: int) -> None:
    row, visible = attention(13, past), torch.ones(13, dtype=torch.bool)
    visible[[3, 4, 9]] = False
    masked = importance(row, visible)
    torch.testing.assert_close(masked, by_hand(row, gone=(3, 4, 9)), rtol=1e-4, atol=1e-6)
    assert masked[~visible].tolist() == [0, 0, 0]
    key = torch.cat([row.key[:, :past], row.key[:, past:][:, visible]], dim=1)
    removed = importance(RowAttention(row.query[:, visible], key, row.scaling))
    assert (masked[visible] - removed).abs().max() > 1e-3


def test_the_most_important_visual_tokens_stay() -> None:
    row, visual = attention(13), torch.tensor([0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0], dtype=torch.bool)
    scores = by_hand(row)
    prompt = PromptRow(15, 8, visual, ~visual, torch.randn(13, 6), torch.arange(13), previous=row)
    best = sorted(sorted(prompt.images.tolist(), key=lambda place: -float(scores[place]))[:5])
    assert prompt.images[AIMPruning().reduce(prompt, 5).anchor].tolist() == best
    assert len(AIMPruning().reduce(prompt, 0)) == 0


@pytest.mark.parametrize(
    ("method", "depth", "layers"),
    [
        (AIMPruning(), 28, range(15, 23)),
        (AIMPruning(), 32, range(17, 25)),
        (AIMPruning(first=13), 32, range(14, 22)),
        (AIMPruning(), 80, range(43, 51)),
        (AIMPruning(), 12, range(6, 10)),
        (AIMPruning(), 4, range(2, 4)),
        (AIMPruning(first=0), 4, range(1, 4)),
        (AIMPruning(), 3, range(1, 3)),
        (AIMPruning(steps=1), 28, range(15, 16)),
        (AIMPruning(first=19), 28, range(20, 23)),
        (AIMPruning(first=19, steps=8), 28, range(20, 28)),
    ],
)
def test_layers(method: AIMPruning, depth: int, layers: range) -> None:
    llm = LLMFacts(depth, 4)
    assert method.layers(llm) == tuple(layers)
    for tokens in (1, 5, 576):
        plan = method.plan(tokens, tokens, 1.0, llm)
        shares = [1 - number / len(layers) for number in range(1, len(layers) + 1)]
        assert plan == [math.floor(tokens * share + 1e-9) for share in shares] and plan[-1] == 0


@pytest.mark.parametrize(
    ("options", "depth"),
    [
        ({"first": -1}, 28),
        ({"steps": 0}, 28),
        ({"first": 27}, 28),
        ({"first": 20, "steps": 8}, 28),
        ({"first": 22}, 28),
    ],
)
def test_layers_that_are_not_there_are_refused(options: dict[str, int], depth: int) -> None:
    with pytest.raises(SpecError, match=r"do not fit an LLM of 28 layers; tokens can be removed before layers 1\.\.27"):
        AIMPruning(**options).layers(LLMFacts(depth, 4))
    with pytest.raises(SpecError, match="the LLM has 2"):
        AIMPruning().layers(LLMFacts(2, 4))
