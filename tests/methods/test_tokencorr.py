"""TokenCorr against a plain reading of its rule."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from mmcompress.budget import Budget, largest_remainder
from mmcompress.errors import SpecError
from mmcompress.methods._attention import Score
from mmcompress.methods.tokencorr import TokenCorr, repeats
from mmcompress.types import EncoderFacts, Modality, Needs, VisualItem

DEPTH = 6
ENCODER = EncoderFacts(DEPTH, DEPTH - 1, (1, 3, 4))
CLIP_L = EncoderFacts(24, 23, tuple(range(23)))
QWEN25_VL = EncoderFacts(32, 32, (7, 15, 23, 31))
LAYERS: dict[Score, tuple[int, int]] = {"cls": (0, 4), "received": (1, 4)}
both_scores = pytest.mark.parametrize("score", ["cls", "received"])


def make_item(
    seed: int, grids: tuple[tuple[int, int], ...], tiles: Tensor | None = None, modality: Modality = "image"
) -> VisualItem:
    """Attention with outliers, and keys that repeat a few patterns more or less closely."""
    generator = torch.Generator().manual_seed(seed)
    if tiles is None:
        tiles = torch.arange(len(grids)).repeat_interleave(torch.tensor([rows * columns for rows, columns in grids]))
    tokens = len(tiles)
    patterns = torch.randn(8, 4, generator=generator)[torch.randint(8, (DEPTH, tokens), generator=generator)]
    return VisualItem(
        embeddings=torch.randn(tokens, 8, generator=generator),
        grids=grids,
        tiles=tiles,
        modality=modality,
        cls_rows=dict(enumerate(torch.randn(DEPTH, tokens, 3, generator=generator).mul(1.5).exp())),
        received_attention=dict(enumerate(torch.randn(DEPTH, tokens, generator=generator).mul(1.5).exp())),
        key_metric=dict(enumerate(patterns + 0.3 * torch.randn(patterns.shape, generator=generator))),
    )


CROPS = [1 + (row >= 3) * 2 + (column >= 4) for row in range(5) for column in range(7)]
ITEMS = {
    "plane": make_item(1, ((5, 7),)),
    "tiled": make_item(2, ((4, 4), (5, 7)), torch.tensor([0] * 16 + CROPS)),
    "video": make_item(3, ((3, 5),) * 3, modality="video"),
    "line": make_item(4, ((1, 9),)),
    "tiny": make_item(5, ((2, 2),)),
    "thumbnail last": make_item(6, ((3, 3),) * 3, torch.tensor([1, 2, 0]).repeat_interleave(9)),
}
every_item = pytest.mark.parametrize("item", ITEMS.values(), ids=ITEMS)


def keep(method: TokenCorr, item: VisualItem, budget: int) -> list[int]:
    selection = method.compress([item], Budget(budget), method.needs(ENCODER))[0]
    assert selection.weight is None
    return selection.anchor.tolist()


def quantile(values: list[float], fraction: float) -> float:
    place, ordered = fraction * (len(values) - 1), sorted(values)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def tile_of(
    deep: list[float], low: list[float], keys: Tensor, share: int, threshold: float
) -> tuple[list[int], list[int], list[int]]:
    """Global and local tokens of a tile, and what fills it up."""
    tokens = range(len(deep))
    upper = quantile(deep, 0.75)
    outliers = [i for i in tokens if deep[i] > upper + 1.5 * (upper - quantile(deep, 0.25))]
    fresh = [i for i in tokens if all(cosine(keys[i], keys[j]) <= threshold for j in range(i))]
    together = len(outliers) + len(fresh)
    number = math.floor(Fraction(min(share, together) * len(outliers), together) + Fraction(1, 2))
    first = sorted(outliers, key=lambda i: -deep[i])[:number]
    second = [i for i in sorted(fresh, key=lambda i: -low[i]) if i not in first][: share - number]
    others = [i for i in sorted(tokens, key=lambda i: -deep[i]) if i not in first + second]
    return first, second, others[: share - len(first) - len(second)]


def attention(item: VisualItem, score: Score, layer: int) -> list[float]:
    if score == "received":
        return item.received_attention[layer].tolist()
    return [sum(heads) / len(heads) for heads in item.cls_rows[layer].tolist()]


@both_scores
@pytest.mark.parametrize("threshold", [0.9, 0.6])
@every_item
def test_global_and_local_tokens_of_every_tile(item: VisualItem, threshold: float, score: Score) -> None:
    low_layer, deep_layer = LAYERS[score]
    deep, low = attention(item, score, deep_layer), attention(item, score, low_layer)
    members = [[i for i in range(len(item)) if item.tiles[i] == tile] for tile in range(int(item.tiles.max()) + 1)]
    for budget in range(1, len(item)):
        expected = []
        for tile, share in zip(members, largest_remainder(budget, [len(tile) for tile in members]), strict=True):
            keys = item.key_metric[low_layer][tile]
            parts = tile_of([deep[i] for i in tile], [low[i] for i in tile], keys, share, threshold)
            expected += [tile[i] for part in parts for i in part]
        assert keep(TokenCorr(threshold, score), item, budget) == sorted(expected)


def test_the_items_have_tokens_of_every_kind() -> None:
    item = ITEMS["plane"]
    keys, deep, low = item.key_metric[0], attention(item, "cls", 4), attention(item, "cls", 0)
    parts = tile_of(deep, low, keys, 30, 0.9)
    assert all(parts) and sum(map(len, parts)) == 30


PAGE = ".a.......b.c"


def page(deep: list[float], low: list[float]) -> VisualItem:
    """A page of three letters on a blank ground."""
    kinds = sorted(set(PAGE))
    keys = torch.stack([torch.eye(4)[kinds.index(letter)] for letter in PAGE])
    rows = {0: torch.tensor(low)[:, None], 4: torch.tensor(deep)[:, None]}
    return VisualItem(torch.zeros(12, 2), ((3, 4),), torch.zeros(12).long(), cls_rows=rows, key_metric={0: keys})


def test_a_page_of_three_letters() -> None:
    """One outlier on blank ground, three letters, the first blank token; after these the deep layer decides."""
    deep = [0.5, 0.6, 0.7, 0.8, 1.1, 0.6, 9, 0.5, 1.2, 0.7, 0.8, 0.9]
    low = [0.1, 5, 8, 8, 8, 8, 8, 8, 8, 6, 8, 7]
    item = page(deep, low)
    assert keep(TokenCorr(), item, 5) == [0, 1, 6, 9, 11]
    assert keep(TokenCorr(), item, 6) == [0, 1, 6, 8, 9, 11]
    assert keep(TokenCorr(), item, 7) == [0, 1, 4, 6, 8, 9, 11]
    # 1 of 5 is global: of 3 tokens 0.6, of 2 tokens 0.4.
    assert keep(TokenCorr(), item, 3) == [6, 9, 11]
    assert keep(TokenCorr(), item, 2) == [9, 11]


def test_ties_go_to_the_lower_index() -> None:
    item = page([1.0] * 12, [1.0] * 12)
    assert keep(TokenCorr(), item, 3) == [0, 1, 9]
    assert keep(TokenCorr(), item, 6) == [0, 1, 2, 3, 9, 11]


def test_repetition_over_more_tokens_than_are_compared_at_once() -> None:
    kinds = torch.randint(700, (2500,), generator=torch.Generator().manual_seed(0)).tolist()
    angles = torch.arange(700) * (2 * math.pi / 700)
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    seen: set[int] = set()
    expected = []
    for kind in kinds:
        expected.append(kind in seen)
        seen.add(kind)
    assert repeats(circle[kinds], math.cos(math.pi / 700)).tolist() == expected


def test_layers_are_scaled_and_attend_to_the_whole_image() -> None:
    assert TokenCorr().needs(CLIP_L) == Needs(cls_rows=(2, 22), key_metric=(2,))
    assert TokenCorr().needs(EncoderFacts(1, 1, (0,))) == Needs(cls_rows=(0,), key_metric=(0,))
    received = TokenCorr(score="received")
    assert received.needs(CLIP_L) == Needs(received_attention=(2, 22), key_metric=(2,))
    assert received.needs(QWEN25_VL) == Needs(received_attention=(7, 31), key_metric=(7,))


@pytest.mark.parametrize("threshold", [-0.1, 1.1])
def test_thresholds_out_of_range_are_refused(threshold: float) -> None:
    with pytest.raises(SpecError, match=f"threshold={threshold} must be in"):
        TokenCorr(threshold)
