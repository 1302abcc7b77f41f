"""SpecPC's own rule: observation, pooling and neighbours by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmcompress.budget import Budget
from mmcompress.errors import SpecError
from mmcompress.methods.specpc import SpecPC
from mmcompress.types import EncoderFacts, VisualItem

FACTS = EncoderFacts(4, 4, (0, 1, 2, 3))


def item(*layers: list[float]) -> VisualItem:
    tokens = len(layers[0])
    return VisualItem(torch.ones(tokens, 2), ((1, tokens),), torch.zeros(tokens).long(), drafted=torch.tensor(layers))


def kept(method: SpecPC, of: VisualItem, keep: int) -> list[int]:
    anchors: list[int] = method.compress([of], Budget(keep), method.needs(FACTS))[0].anchor.tolist()
    return anchors


def test_later_queries_of_the_window_weigh_more_and_the_highest_counts() -> None:
    rows = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = [max(rows[h, w, t].item() * w / 4 for h in range(2) for w in range(5)) for t in range(7)]
    torch.testing.assert_close(SpecPC().observe(rows), torch.tensor(expected))


def test_the_highest_score_of_all_layers_decides() -> None:
    of = item([0.9, 0.1, 0.2, 0.3], [0.1, 0.2, 0.8, 0.4])
    assert kept(SpecPC(kernel=1), of, 2) == [0, 2]
    assert kept(SpecPC(kernel=1), of, 3) == [0, 2, 3]


def test_neighbours_come_by_distance_and_inside_the_item() -> None:
    of = item([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.9])
    assert kept(SpecPC(kernel=1, neighbours=3), of, 2) == [6, 7]
    of = item([0.0, 0.1, 0.9, 0.3, 0.4, 0.8, 0.6, 0.0, 0.0])
    assert kept(SpecPC(kernel=1, neighbours=3), of, 3) == [1, 2, 3]
    assert kept(SpecPC(kernel=1, neighbours=3), of, 5) == [1, 2, 3, 4, 5]  # 2 with both sides, then 5 and its left
    assert kept(SpecPC(kernel=1, neighbours=2), of, 3) == [2, 3, 5]  # of two, one is behind


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 7])
def test_pooling_takes_more_from_the_right_if_it_is_even(kernel: int) -> None:
    values = torch.rand(20, generator=torch.Generator().manual_seed(1))
    before = (kernel - 1) // 2
    pooled = [max(values[max(0, n - before) : n - before + kernel].tolist()) for n in range(20)]
    ranked = SpecPC(kernel=kernel).ranked(values, 20)
    assert [pooled[n] for n in ranked.tolist()] == sorted(pooled, reverse=True)
    assert sorted(ranked.tolist()) == list(range(20))


def test_a_draft_is_needed_and_said() -> None:
    needs = SpecPC(draft="folder", window=8, skip=0.25).needs(FACTS)
    assert needs.draft is not None and (needs.draft.folder, needs.draft.window, needs.draft.skip) == ("folder", 8, 0.25)
    scores: Tensor = needs.draft.observe(torch.ones(1, 2, 3))
    assert scores.tolist() == [1.0] * 3
    assert SpecPC.info.lacking(SpecPC()) == "draft="  # type: ignore[attr-defined]


def test_every_choice_is_of_the_budget() -> None:
    values = torch.rand(2, 31, generator=torch.Generator().manual_seed(2)).tolist()
    for neighbours in (1, 2, 5, 31, 64):
        for keep in (1, 4, 17, 30):
            assert len(kept(SpecPC(neighbours=neighbours), item(*values), keep)) == keep


@pytest.mark.parametrize("options", [{"window": 1}, {"kernel": 0}, {"neighbours": 0}, {"skip": 1.0}, {"skip": -0.1}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=rf"^specpc: {next(iter(options))}="):
        SpecPC(**options)
