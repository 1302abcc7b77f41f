"""Greedy MAP of a determinantal point process against determinants."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mmcompress import ops
from mmcompress.kernels.dpp_select.naive import dpp_select as naive
from mmcompress.kernels.greedy_select import rows


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """With deterministic algorithms on, torch fills what `torch.empty` returns with NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random(tokens: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(31 * tokens + dim)
    return torch.randn(tokens, dim, generator=generator).to(dtype), 0.1 + torch.rand(tokens, generator=generator)


def select(tokens: Tensor, relevance: Tensor, count: int) -> list[int]:
    """The order for one image."""
    (order,) = ops.dpp_select([tokens], [relevance], [count])
    assert order.dtype == torch.long
    return order.tolist()


@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (9, 4), (23, 12), (12, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_maximises_determinants(shape: tuple[int, int], dtype: torch.dtype) -> None:
    tokens, relevance = random(*shape, dtype)
    count = min(shape)
    order = select(tokens, relevance, count)
    assert order == naive([tokens], [relevance], [count])[0].tolist()
    for fewer in range(count):
        assert select(tokens, relevance, fewer) == order[:fewer]


@pytest.mark.parametrize(("ahead", "few"), [(1, 0), (3, 9), (8, 11), (32, 1024)])
@pytest.mark.parametrize("held_bytes", [0, 4 * 4 * 23 * 7, 2**30])
def test_images_depend_neither_on_their_batch_nor_on_what_is_held(
    ahead: int, few: int, held_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "AHEAD", ahead)
    monkeypatch.setattr(rows, "FEW", few)
    monkeypatch.setattr(rows, "HELD_BYTES", held_bytes)
    tokens, relevance = zip(random(9, 4), random(23, 12), random(1, 3), random(12, 40), strict=True)
    counts = [4, 7, 1, 12]
    orders = ops.dpp_select(tokens, relevance, counts)
    assert [order.tolist() for order in orders] == [order.tolist() for order in naive(tokens, relevance, counts)]
    assert ops.dpp_select([], [], []) == []


def test_lengths_of_tokens_do_not_count_but_relevance_does() -> None:
    tokens, relevance = random(17, 9)
    stretched = tokens * torch.linspace(0.5, 20, 17)[:, None]
    order = select(tokens, relevance, 9)
    assert select(stretched, relevance, 9) == order
    assert select(tokens, 7 * relevance, 9) == order
    assert select(tokens, relevance.flip(0), 9) != order
    assert order[0] == int(relevance.argmax())


def test_hand_made() -> None:
    # 1 repeats 0 and spans nothing beside it; 2 is at 30 degrees to it and 3 at 90, but counts a fifth.
    angles = torch.deg2rad(torch.tensor([0.0, 0.0, 30.0, 90.0]))
    tokens = torch.stack([angles.cos(), angles.sin()], dim=1)
    relevance = torch.tensor([1.0, 0.9, 0.8, 0.2])
    assert select(tokens, relevance, 2) == [0, 2]  # 0.8 sin 30 = 0.4 is more than 0.2 sin 90
    assert select(tokens, torch.ones(4), 2) == [0, 3]


def test_ties_go_to_the_lower_index() -> None:
    # Signed unit vectors have exact cosines, so every tie is a true one.
    tokens = torch.eye(4)[[0, 1, 0, 2, 1, 3, 0, 2]] * torch.tensor([1, 1, -1, 1, 1, 1, -1, -1])[:, None]
    assert select(tokens, torch.ones(8), 8) == [0, 1, 3, 5, 2, 4, 6, 7]


@pytest.mark.parametrize("tokens", [random(200, 5)[0], torch.ones(30, 4), torch.zeros(30, 4)], ids=["low", "one", "no"])
def test_beyond_the_rank_tokens_are_still_distinct(tokens: Tensor) -> None:
    for relevance in (torch.ones(len(tokens)), random(len(tokens), 1)[1], torch.full((len(tokens),), 1e-6)):
        order = select(tokens, relevance, len(tokens))
        assert sorted(order) == list(range(len(tokens)))


def test_rounding_does_not_spoil_what_comes_after_near_copies() -> None:
    # Fifty near copies of five tokens, then one token of its own direction: it must come within the first six.
    five, _ = random(5, 6)
    copies = five.repeat(10, 1)
    own = torch.linalg.svd(five).Vh[5:]
    noise = 1e-7 * random(50, 6)[0]
    order = select(torch.cat([copies + noise, own]), torch.ones(51), 51)
    assert 50 in order[:6]
    assert len(set(order)) == 51


def test_inputs_are_left_alone() -> None:
    tokens, relevance = random(9, 4)
    before = tokens.clone(), relevance.clone()
    ops.dpp_select([tokens], [relevance], [5])
    assert torch.equal(before[0], tokens) and torch.equal(before[1], relevance)
