"""DART against a plain reading of its rule, and its budget's edges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mmcompress.errors import SpecError
from mmcompress.llm_method import PromptRow, RowAttention
from mmcompress.methods.dart import DART


def make_row(layout: str, seed: int = 0, past: int = 0) -> PromptRow:
    """A row written with "v" for visual tokens, "t" for text and "n" for separators."""
    generator = torch.Generator().manual_seed(seed)
    tokens = len(layout)
    normed = torch.randn(tokens, 6, generator=generator)
    key = torch.randn(2, past + tokens, 4, generator=generator)
    return PromptRow(
        layer=2,
        total=layout.count("v"),
        visual=torch.tensor([kind == "v" for kind in layout]),
        text=torch.tensor([kind == "t" for kind in layout]),
        hidden=normed,
        source=torch.arange(tokens),
        previous=RowAttention(key[:, past:].repeat(2, 1, 1), key, 0.5),
        normed=normed,
    )


def by_norm(row: PromptRow, places: list[int], count: int) -> list[int]:
    assert row.previous is not None
    key = row.previous.key[:, row.previous.past :]
    return sorted(places, key=lambda place: -float(key[:, place].abs().sum()))[:count]


def kept_by_hand(row: PromptRow, left: int, shares: list[int], text: list[int]) -> list[int]:
    """Places in the row; `shares` of the visits in turn, `text` the tokens behind the images."""
    assert row.normed is not None
    images = row.images.tolist()
    kept = by_norm(row, images, min(4, left))
    for pivot, share in zip([*kept, *by_norm(row, text, 4)], shares, strict=True):
        likeness = {place: float(cosine_similarity(row.normed[pivot], row.normed[place], 0)) for place in images}
        free = [place for place in images if place not in kept]
        kept += sorted(free, key=lambda place: likeness[place])[:share]
    return sorted(kept)


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize(
    ("layout", "left", "shares", "text"),
    [
        ("tt" + "v" * 40 + "ttttttt", 20, [2] * 8, range(42, 49)),
        ("tt" + "v" * 40 + "ttttttt", 15, [2, 2, 2, 1, 1, 1, 1, 1], range(42, 49)),
        ("t" + "v" * 9 + "n" + "ttt" + "v" * 12 + "n" + "tt", 17, [3, 2, 2, 2, 2, 2], range(27, 29)),
        ("t" + "v" * 30 + "tttt", 6, [1, 1, 0, 0, 0, 0, 0, 0], range(31, 35)),
        ("t" + "v" * 30 + "tttt", 29, [4, 3, 3, 3, 3, 3, 3, 3], range(31, 35)),
        ("t" + "v" * 12 + "n", 9, [1, 1, 1, 1, 1], [13]),
    ],
)
def test_pivots_take_what_is_least_like_them(
    layout: str, left: int, shares: list[int], text: list[int], past: int
) -> None:
    row = make_row(layout, len(layout) + left, past)
    assert sum(shares) == left - 4
    kept = row.images[DART().reduce(row, left).anchor].tolist()
    assert kept == kept_by_hand(row, left, shares, list(text))


@pytest.mark.parametrize("left", [1, 3, 4])
def test_a_tiny_budget_is_spent_on_pivots(left: int) -> None:
    row = make_row("tt" + "v" * 20 + "ttttt", left)
    kept = row.images[DART().reduce(row, left).anchor].tolist()
    assert kept == sorted(by_norm(row, row.images.tolist(), left))


def test_the_published_budget() -> None:
    row = make_row("t" * 35 + "v" * 576 + "t" * 40)
    method = DART()
    pivots = method.pivots(row, 132)
    assert len(pivots) == 8 and len(method.least_duplicated(row, pivots, 132)) == 132
    without_last = method.least_duplicated(row, pivots[:7], 4 + 7 * 16).anchor
    assert set(without_last.tolist()) < set(method.least_duplicated(row, pivots, 132).anchor.tolist())


def test_of_equals_the_first() -> None:
    row = make_row("v" * 12 + "tt")
    assert row.previous is not None
    alike = replace(row, previous=RowAttention(*map(torch.ones_like, row.previous[:2]), 0.5), normed=torch.ones(14, 6))
    assert DART().pivots(alike, 7).tolist() == [0, 1, 2, 3, 12, 13]
    assert DART().reduce(alike, 7).anchor.tolist() == list(range(7))


def test_half_precision_is_compared_in_full() -> None:
    row = make_row("t" + "v" * 24 + "tttt")
    assert row.previous is not None and row.normed is not None

    def halved(values: Tensor) -> Tensor:
        return values.to(torch.bfloat16)

    half = replace(row, previous=RowAttention(*map(halved, row.previous[:2]), 0.5), normed=halved(row.normed))
    assert half.previous is not None and half.normed is not None
    exact = replace(
        half, previous=RowAttention(*(part.float() for part in half.previous[:2]), 0.5), normed=half.normed.float()
    )
    assert DART().reduce(half, 11).anchor.tolist() == DART().reduce(exact, 11).anchor.tolist()


@pytest.mark.parametrize("options", [{"layer": 0}, {"image_pivots": 0}, {"text_pivots": -1}])
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(SpecError, match=f"{name}={value} must be at least {value + 1}"):
        DART(**options)


def test_other_numbers_of_pivots() -> None:
    row = make_row("t" + "v" * 24 + "tttt")
    assert len(DART(image_pivots=2, text_pivots=0).pivots(row, 11)) == 2
    assert len(DART(image_pivots=30).pivots(row, 11)) == 11 + 4
    assert len(DART(image_pivots=2, text_pivots=0).reduce(row, 11)) == 11
