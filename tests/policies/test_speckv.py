"""SpecKV's scores by hand: every observer's softmax row, the highest or the mean of them, and pooling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mmcompress.errors import SpecError
from mmcompress.kv_policy import Ahead, KVRow
from mmcompress.policies.speckv import SpecKV

HEADS, GROUP, DIM, TOKENS, AHEAD, WINDOW, KERNEL = 2, 3, 8, 20, 4, 3, 5


def prompt(ahead: int = AHEAD, held: torch.Tensor | None = None) -> KVRow:
    """A layer's prompt of text, or the entries `held` that are left of it, and what is expected behind it."""
    generator = torch.Generator().manual_seed(0)
    query = 2 * torch.randn(HEADS * GROUP, TOKENS + AHEAD, DIM, generator=generator)
    key = 2 * torch.randn(HEADS, TOKENS + AHEAD, DIM, generator=generator)
    place = torch.arange(TOKENS) if held is None else held
    return KVRow(
        layer=0,
        layers=1,
        key=key[:, place],
        value=key[:, place],
        place=place.expand(HEADS, -1),
        visual=torch.zeros(HEADS, len(place), dtype=torch.bool),
        seen=TOKENS,
        scaling=DIM**-0.5,
        query=query[:, TOKENS - WINDOW - 1 : TOKENS],
        ahead=Ahead(query[:, TOKENS : TOKENS + ahead], key[:, TOKENS : TOKENS + ahead]),
    )


def by_hand(row: KVRow, reduction: str) -> torch.Tensor:
    """`[kv_heads, entries before the window]`."""
    assert row.query is not None and row.ahead is not None
    query, key = torch.cat([row.query, row.ahead.query], 1), torch.cat([row.key, row.ahead.key], 1)
    before, scores = row.entries - WINDOW - 1, []
    for head in range(HEADS):
        rows = []
        for reader in range(head * GROUP, (head + 1) * GROUP):
            for number, asked in enumerate(query[reader]):
                seen = before + number + 1
                rows.append((key[head, :seen] @ asked * DIM**-0.5).softmax(0)[:before])
        plain = torch.stack(rows).amax(0) if reduction == "max" else torch.stack(rows).mean(0)
        scores.append([max(plain[max(0, n - 2) : n + 3].tolist()) for n in range(before)])
    return torch.tensor(scores)


@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize("ahead", [1, AHEAD])
def test_scores_and_choice(reduction: Any, ahead: int) -> None:
    policy = SpecKV(window=WINDOW, kernel=KERNEL, lookahead=AHEAD, reduction=reduction)
    row = prompt(ahead)
    expected = by_hand(row, reduction)
    torch.testing.assert_close(policy.score(row)[:, : expected.shape[1]], expected)
    for kept, scores in zip(policy.select(row, 9), expected.tolist(), strict=True):
        best = sorted(range(len(scores)), key=lambda n: (-scores[n], n))[: 9 - WINDOW - 1]
        assert kept.tolist() == [*sorted(best), *range(TOKENS - WINDOW - 1, TOKENS)]


def test_what_is_expected_matters() -> None:
    policy, row = SpecKV(window=WINDOW, kernel=1), prompt()
    assert row.ahead is not None
    asks_for_the_first = replace(row, ahead=row.ahead._replace(query=50 * row.key[:, :1].repeat_interleave(GROUP, 0)))
    assert not torch.equal(policy.score(row), policy.score(prompt(1)))
    assert policy.score(asks_for_the_first)[:, 0].min() > 0.9


def test_entries_that_went_before_leave_gaps() -> None:
    held = torch.tensor([0, 3, 4, 9, 11, 12, 15, *range(TOKENS - WINDOW - 1, TOKENS)])
    policy, row = SpecKV(window=WINDOW, kernel=KERNEL), prompt(held=held)
    torch.testing.assert_close(policy.score(row)[:, :7], by_hand(row, "max"))
    assert all(kept[-WINDOW - 1 :].tolist() == list(range(7, 11)) for kept in policy.select(row, 6))


@pytest.mark.parametrize("options", [{"lookahead": 0}, {"window": -1}, {"kernel": 4}, {"kernel": 0}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=rf"^speckv: .*{next(iter(options))}="):
        SpecKV(**options)
