"""HiRED, GlobalCom2 and CDPruner against plain readings of their rules."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmcompress.budget import Budget
from mmcompress.errors import InputError, SpecError
from mmcompress.method import VisualMethod
from mmcompress.methods.cdpruner import CDPruner
from mmcompress.methods.globalcom2 import GlobalCom2
from mmcompress.methods.hired import HiRED, divide
from mmcompress.types import EncoderFacts, VisualItem

DEPTH, HEADS, DIM = 4, 3, 24
CLIP = EncoderFacts(DEPTH, DEPTH - 1, tuple(range(DEPTH - 1)))


def item_of(seed: int, grids: tuple[tuple[int, int], ...], tiles: Tensor, crops: tuple[int, int] | None) -> VisualItem:
    generator = torch.Generator().manual_seed(seed)

    def layers(*shape: int) -> dict[int, Tensor]:
        return {layer: torch.rand(len(tiles), *shape, generator=generator) for layer in range(DEPTH)}

    return VisualItem(
        embeddings=torch.randn(len(tiles), DIM, generator=generator),
        grids=grids,
        tiles=tiles,
        crops=crops,
        cls_rows=layers(HEADS),
        cls_logits={layer: 4 * values - 2 for layer, values in layers().items()},
        received_attention=layers(),
        text=torch.randn(5, DIM, generator=generator),
        relevance=torch.rand(2, len(tiles), generator=generator) - 0.5,
    )


def tiled(
    seed: int, thumbnail: tuple[int, int], crops: tuple[int, int], row_tiles: list[int], column_tiles: list[int]
) -> VisualItem:
    """A thumbnail, and a plane whose rows and columns lie in these rows and columns of crops."""
    rows, columns = torch.tensor(row_tiles), torch.tensor(column_tiles)
    stitched = (1 + rows[:, None] * crops[1] + columns).flatten()
    tiles = torch.cat([torch.zeros(thumbnail[0] * thumbnail[1], dtype=torch.long), stitched])
    return item_of(seed, (thumbnail, (len(rows), len(columns))), tiles, crops)


def thumbnail_last(item: VisualItem) -> tuple[VisualItem, Tensor]:
    """The item with its planes in the other order, and where each of its tokens was."""
    size = item.grids[0][0] * item.grids[0][1]
    order = torch.cat([torch.arange(size, len(item)), torch.arange(size)])
    names = ("cls_rows", "cls_logits", "received_attention")
    layers = {name: {at: value[order] for at, value in getattr(item, name).items()} for name in names}
    turned = replace(item, embeddings=item.embeddings[order], grids=item.grids[::-1], tiles=item.tiles[order], **layers)
    return turned, order


SQUARE = tiled(1, (4, 4), (2, 2), [0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1])
LANDSCAPE = tiled(2, (4, 4), (2, 2), [0, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1])
WIDE = tiled(3, (5, 5), (1, 3), [0] * 5, [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2])
TALL = tiled(4, (3, 3), (3, 1), [0, 1, 1, 1, 2], [0, 0, 0])
RESIZED = tiled(5, (4, 4), (3, 2), [0, 1, 2], [0, 1])
WITHOUT_CROP = tiled(6, (3, 3), (2, 2), [0, 1], [0, 0])  # nothing is left of crops 2 and 4
TINY = tiled(7, (1, 1), (1, 3), [0], [0, 1, 2])
TILED = {
    "square": SQUARE,
    "landscape": LANDSCAPE,
    "wide": WIDE,
    "tall": TALL,
    "resized": RESIZED,
    "without a crop": WITHOUT_CROP,
    "tiny": TINY,
}
PLAIN = {
    "plane": item_of(8, ((4, 5),), torch.zeros(20, dtype=torch.long), None),
    "line": item_of(9, ((1, 7),), torch.zeros(7, dtype=torch.long), None),
    "planes": item_of(10, ((2, 3), (3, 3), (1, 2)), torch.tensor([1] * 6 + [2] * 9 + [0] * 2), None),
    "video": replace(
        item_of(11, ((2, 2),) * 3, torch.arange(3).repeat_interleave(4), None), modality="video", label="video"
    ),
}
every_tiled = pytest.mark.parametrize("item", TILED.values(), ids=TILED)
every_item = pytest.mark.parametrize("item", [*TILED.values(), *PLAIN.values()], ids=[*TILED, *PLAIN])


def kept(method: VisualMethod, item: VisualItem, budget: int) -> list[int]:
    return method.compress([item], Budget(budget), method.needs(CLIP))[0].anchor.tolist()


def best(item: VisualItem, scores: list[float], shares: list[int]) -> list[int]:
    """The highest scores of each tile, the lower index first."""
    chosen = []
    for tile, share in enumerate(shares):
        members = [i for i in range(len(item)) if int(item.tiles[i]) == tile]
        chosen += sorted(members, key=lambda i: (-scores[i], i))[:share]
    return sorted(chosen)


def sizes_of(item: VisualItem) -> list[int]:
    tiles = 1 + (item.crops[0] * item.crops[1] if item.crops else int(item.tiles.max()))
    return [int((item.tiles == tile).sum()) for tile in range(tiles)]


def by_size(budget: int, sizes: list[int]) -> list[int]:
    """Largest remainder, in fractions."""
    quotas = [Fraction(budget * size, sum(sizes)) for size in sizes]
    shares = [math.floor(quota) for quota in quotas]
    for i in sorted(range(len(sizes)), key=lambda i: (shares[i] - quotas[i], i))[: budget - sum(shares)]:
        shares[i] += 1
    return shares


# --- hired


def hired_weights(item: VisualItem, attention: list[float], allocation: str, alpha: float) -> list[float]:
    assert item.crops is not None
    (rows, columns), (crop_rows, crop_columns) = item.grids[0], item.crops
    crops = crop_rows * crop_columns
    weights = [0.0] * crops
    ranked = sorted(range(rows * columns), key=lambda i: (-attention[i], i))
    for i in range(rows * columns):
        if allocation == "spatial":
            weights[i // columns * crop_rows // rows * crop_columns + i % columns * crop_columns // columns] += (
                attention[i]
            )
        else:
            weights[i * crops // (rows * columns)] += i in ranked[: int(rows * columns * (1 - alpha))]
    return weights


def hired_shares(item: VisualItem, budget: int, weights: list[float], alpha: float, official: bool) -> list[int]:
    size, *crops = sizes_of(item)
    thumbnail = min(int(budget * alpha), size)
    rest = min(budget - thumbnail, sum(crops))
    if official:
        whole = sum(weights) or 1.0
        parts = [min(int(weight / whole * rest), crop) for weight, crop in zip(weights, crops, strict=True)]
        return [thumbnail, *parts]
    shares = [0] * len(crops)
    exact = [Fraction(weight) for weight in weights]
    while left := rest - sum(shares):
        free = [j for j in range(len(crops)) if shares[j] < crops[j]]
        whole = sum(exact[j] for j in free)
        room = {j: crops[j] - shares[j] for j in free}
        quotas = {j: left * (exact[j] / whole if whole else Fraction(room[j], sum(room.values()))) for j in free}
        given = {j: math.floor(quota) for j, quota in quotas.items()}
        for j in sorted(free, key=lambda j: (given[j] - quotas[j], j))[: left - sum(given.values())]:
            given[j] += 1
        for j in free:
            shares[j] = min(shares[j] + given[j], crops[j])
    return [budget - rest, *shares]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("allocation", ["spatial", "stripes"])
@every_tiled
def test_hired(item: VisualItem, allocation: Literal["spatial", "stripes"], official: bool, alpha: float) -> None:
    method = HiRED(alpha, allocation, compat="official" if official else "none")
    first = [float(rows.double().sum()) for rows in item.cls_rows[0]]
    last = [float(rows.double().sum()) for rows in item.cls_rows[2]]
    weights = hired_weights(item, first, allocation, alpha)
    for budget in range(1, len(item)):
        shares = hired_shares(item, budget, weights, alpha, official)
        if not any(shares):
            shares[0] = 1  # something must stay
        assert method.exact_count != official
        assert kept(method, item, budget) == best(item, last, shares)
        assert official or sum(shares) == budget


def test_hired_gives_a_crop_what_its_region_of_the_thumbnail_gets() -> None:
    attention = torch.full((80, HEADS), 1e-3)
    attention[12] = 1.0  # the lower left corner of the thumbnail: crop 3 of 2 x 2, but the last of four stripes
    item = replace(SQUARE, cls_rows={**SQUARE.cls_rows, 0: attention})
    needs = HiRED().needs(CLIP)
    assert HiRED().shares(item, 20, needs) == [10, 0, 0, 10, 0]
    assert HiRED().shares(item, 40, needs) == [16, 3, 3, 16, 2]  # the crop is full, and so is the thumbnail
    assert HiRED(alpha=0.9, allocation="stripes").shares(item, 20, needs) == [16, 0, 0, 0, 4]


def test_hired_official_loses_what_rounding_leaves() -> None:
    for method in (HiRED(compat="official"), HiRED(allocation="stripes", compat="official")):
        counts = [len(kept(method, SQUARE, budget)) for budget in range(1, 80)]
        assert all(0 < count <= budget for budget, count in enumerate(counts, 1))
        assert any(count < budget for budget, count in enumerate(counts, 1))


@pytest.mark.parametrize("item", PLAIN.values(), ids=PLAIN)
def test_hired_without_crops_ranks_planes_by_the_last_layer(item: VisualItem) -> None:
    scores = [float(rows.double().sum()) for rows in item.cls_rows[2]]
    for budget in range(1, len(item)):
        expected = best(item, scores, by_size(budget, sizes_of(item)))
        assert kept(HiRED(), item, budget) == expected
        assert kept(HiRED(allocation="stripes", compat="official"), item, budget) == expected


def test_hired_received_reads_the_first_and_the_last_global_layer() -> None:
    received = HiRED(score="received")
    assert received.needs(EncoderFacts(32, 32, (7, 15, 23, 31))).received_attention == (7, 31)
    assert received.needs(EncoderFacts(4, 4, (2,))).received_attention == (2,)
    assert HiRED().needs(EncoderFacts(24, 23, tuple(range(23)))).cls_rows == (0, 22)
    assert HiRED().needs(EncoderFacts(2, 1, (0,))).cls_rows == (0,)
    first, last = (LANDSCAPE.received_attention[layer].tolist() for layer in (0, 2))
    weights = hired_weights(LANDSCAPE, first, "spatial", 0.5)
    for budget in (1, 9, 25, 39):
        shares = hired_shares(LANDSCAPE, budget, weights, 0.5, False)
        assert kept(received, LANDSCAPE, budget) == best(LANDSCAPE, last, shares)


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_hired_refuses_shares_out_of_range(alpha: float) -> None:
    with pytest.raises(SpecError, match=rf"alpha={alpha} is out of range; use a share in \[0, 1\]"):
        HiRED(alpha)


@pytest.mark.parametrize(
    ("total", "weights", "sizes", "shares"),
    [
        (10, [1, 1, 2], [10, 10, 10], [3, 2, 5]),  # 2.5 and 2.5: the earlier gets the rest
        (10, [8, 1, 1], [4, 10, 10], [4, 3, 3]),
        (10, [1e-30, 1, 0], [20, 3, 20], [10 - 3, 3, 0]),
        (4, [0, 0], [1, 5], [1, 3]),
        (0, [1, 2], [3, 3], [0, 0]),
        (6, [1, 2], [3, 3], [3, 3]),
    ],
)
def test_divide(total: int, weights: list[float], sizes: list[int], shares: list[int]) -> None:
    assert divide(total, weights, sizes) == shares


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 40)), min_size=1, max_size=6), st.data())
def test_divide_is_exact_and_within_sizes(parts: list[tuple[float, int]], data: st.DataObject) -> None:
    weights, sizes = map(list, zip(*parts, strict=True))
    total = data.draw(st.integers(0, sum(sizes)))
    shares = divide(total, weights, sizes)
    assert sum(shares) == total
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))


# --- globalcom2


def globalcom2_densities(item: VisualItem, temperature: float) -> list[float]:
    assert item.crops is not None
    (rows, columns), (crop_rows, crop_columns) = item.grids[0], item.crops
    totals = [0.0] * (crop_rows * crop_columns)
    for i in range(rows * columns):
        row = min(i // columns // max(rows // crop_rows, 1), crop_rows - 1)
        column = min(i % columns // max(columns // crop_columns, 1), crop_columns - 1)
        totals[row * crop_columns + column] += float(item.cls_logits[3][i])
    powers = [math.exp((total - max(totals)) / temperature) for total in totals]
    shares = [power / (sum(powers) + 1e-8) for power in powers]
    return [1.0, *(1 + share - sum(shares) / len(shares) for share in shares)]


def globalcom2_scores(item: VisualItem) -> list[float]:
    (rows, columns), (height, width) = item.grids
    logits = [float(value) for value in item.cls_logits[3]]

    def enlarged(row: int, column: int) -> float:
        y = max((row + 0.5) * rows / height - 0.5, 0.0)
        x = max((column + 0.5) * columns / width - 0.5, 0.0)
        top, left = int(y), int(x)
        return sum(
            logits[min(top + down, rows - 1) * columns + min(left + right, columns - 1)]
            * (y - top if down else 1 - y + top)
            * (x - left if right else 1 - x + left)
            for down in (0, 1)
            for right in (0, 1)
        )

    size = rows * columns
    overview = [0.0] * size + [enlarged(i // width, i % width) for i in range(height * width)]
    scores = logits[:size]
    for i in range(size, len(item)):
        mates = [j for j in range(size, len(item)) if item.tiles[j] == item.tiles[i]]
        scores.append(sum(plane[i] / math.hypot(*(plane[j] for j in mates)) for plane in (logits, overview)))
    return scores


@pytest.mark.parametrize("temperature", [10.0, 1.5])
@every_tiled
def test_globalcom2(item: VisualItem, temperature: float) -> None:
    method = GlobalCom2(temperature)
    needs = method.needs(CLIP)
    densities = globalcom2_densities(item, temperature)
    scores = globalcom2_scores(item)
    assert method.densities(item, needs).tolist() == pytest.approx(densities, abs=1e-12)
    assert method.scores(item, needs).tolist() == pytest.approx(scores, abs=1e-5)
    sizes = sizes_of(item)
    for budget in range(1, len(item)):
        shares = method.shares(item, budget, needs).tolist()
        assert sum(shares) == budget
        # The counts of the paper: below the ratio that was just enough for the last token, and at it.
        ratio = max(k / (n * d) for k, n, d in zip(shares, sizes, densities, strict=True) if k)
        below, at = (
            [int(n * min(1.0, near * d) + 1e-9) for n, d in zip(sizes, densities, strict=True)]
            for near in (ratio * (1 - 1e-5), ratio * (1 + 1e-5))
        )
        assert all(fewest <= share <= most for fewest, share, most in zip(below, shares, at, strict=True))
        assert sum(at) - sum(below) == 1 or item is TINY  # of whose crops two are alike
        assert kept(method, item, budget) == best(item, scores, shares)


def test_globalcom2_without_contrast_keeps_tiles_by_size() -> None:
    flat = replace(SQUARE, cls_logits={3: torch.ones(80)})
    needs = GlobalCom2().needs(CLIP)
    assert GlobalCom2().shares(flat, 40, needs).tolist() == [8] * 5
    assert GlobalCom2().shares(flat, 42, needs).tolist() == [9, 9, 8, 8, 8]


def test_globalcom2_reads_the_last_layer_and_looks_where_the_thumbnail_does() -> None:
    assert GlobalCom2().needs(EncoderFacts(24, 23, tuple(range(23)))).cls_logits == (23,)
    logits = torch.zeros(80)
    logits[12] = 200.0  # the lower left corner of the thumbnail: p is 1 for crop 3 of 2 x 2
    item = replace(SQUARE, cls_logits={3: logits})
    needs = GlobalCom2().needs(CLIP)
    assert GlobalCom2().densities(item, needs).tolist() == pytest.approx([1, 0.75, 0.75, 1.75, 0.75])
    assert GlobalCom2().shares(item, 20, needs).tolist() == [4, 3, 3, 7, 3]  # a quarter, all exact
    assert GlobalCom2().shares(item, 68, needs).tolist() == [16, 12, 12, 16, 12]  # all of the crop it looks at


@pytest.mark.parametrize("item", PLAIN.values(), ids=PLAIN)
def test_globalcom2_without_crops_ranks_planes_by_their_logits(item: VisualItem) -> None:
    scores = item.cls_logits[3].tolist()
    for budget in range(1, len(item)):
        assert kept(GlobalCom2(), item, budget) == best(item, scores, by_size(budget, sizes_of(item)))


def test_globalcom2_official_order() -> None:
    # Columns 1..5 of two 3 x 3 crops side by side are left, so each crop has 6 of 9 tokens.
    item = tiled(12, (3, 3), (1, 2), [0, 0, 0], [0, 0, 1, 1])
    official = kept(GlobalCom2(compat="official"), item, 20)
    assert sorted(official) == kept(GlobalCom2(), item, 20)
    logits = item.cls_logits[3].tolist()
    thumbnail = [i for i in official if i < 9]
    assert official[: len(thumbnail)] == thumbnail == sorted(thumbnail, key=lambda i: -logits[i])
    # Row after row of 3, as if they filled the crops: 0..2 of the left, 0..2 of the right, 3..5 of the left, ...
    left, right = ([i for i in range(9, 21) if item.tiles[i] == tile] for tile in (1, 2))
    written = [*left[:3], *right[:3], *left[3:], *right[3:]]
    assert written != sorted(written)
    assert official[len(thumbnail) :] == [i for i in written if i in official]


def test_globalcom2_refuses_a_temperature_of_zero() -> None:
    with pytest.raises(SpecError, match=r"temperature=0.0 must be above 0"):
        GlobalCom2(0.0)


@pytest.mark.parametrize("method", [HiRED(), HiRED(allocation="stripes"), GlobalCom2()], ids=str)
@every_tiled
def test_the_thumbnail_may_come_last(method: VisualMethod, item: VisualItem) -> None:
    turned, order = thumbnail_last(item)
    for budget in range(1, len(item)):
        assert sorted(order[kept(method, turned, budget)].tolist()) == kept(method, item, budget)


# --- cdpruner


def spanning(item: VisualItem, similarity: list[float], low: float, high: float, budget: int) -> list[int]:
    """Greedy MAP by determinants, tile by tile."""
    alike = low == high
    relevance = torch.tensor([1.0 if alike else (value - low + 1e-6) / (high - low) for value in similarity]).double()
    vectors = relevance[:, None] * torch.nn.functional.normalize(item.embeddings.double(), dim=1)
    kernel = (vectors @ vectors.T).diagonal_scatter(relevance.square())
    chosen = []
    for tile, share in enumerate(by_size(budget, sizes_of(replace(item, crops=None)))):
        members = [i for i in range(len(item)) if int(item.tiles[i]) == tile]
        own: list[int] = []
        for _ in range(share):
            left = [i for i in members if i not in own]
            own.append(max(left, key=lambda i: float(torch.linalg.det(kernel[[*own, i]][:, [*own, i]]))))
        chosen += own
    return sorted(chosen)


def budgets(item: VisualItem) -> tuple[int, ...]:
    """No tile's share is more than the rank of its tokens."""
    return tuple(sorted({1, 2, len(item) // 4 + 1, len(item) // 2}))


@every_item
def test_cdpruner_without_its_condition_spans_the_most_volume(item: VisualItem) -> None:
    for budget in budgets(item):
        assert kept(CDPruner(relevance="constant"), item, budget) == spanning(item, [0.0] * len(item), 0.0, 0.0, budget)


@every_item
def test_cdpruner_counts_similarity_to_the_question_negatively(item: VisualItem) -> None:
    assert item.relevance is not None
    similarity = (-item.relevance.mean(dim=0)).tolist()
    method = CDPruner(text_tower="given")
    for budget in budgets(item):
        expected = spanning(item, similarity, min(similarity), max(similarity), budget)
        assert kept(method, item, budget) == expected


@every_item
def test_cdpruner_with_the_embeddings_of_the_text(item: VisualItem) -> None:
    assert item.text is not None
    cosines = torch.nn.functional.cosine_similarity(item.embeddings[:, None], item.text[None], dim=-1)
    similarity = cosines.double().mean(dim=1).tolist()
    for budget in budgets(item):
        expected = spanning(item, similarity, min(similarity), max(similarity), budget)
        assert kept(CDPruner(relevance="text"), item, budget) == expected
        wordless = replace(item, text=torch.empty(0, DIM))
        assert kept(CDPruner(relevance="text"), wordless, budget) == kept(CDPruner(relevance="constant"), item, budget)


def test_cdpruner_takes_the_token_that_matters_first() -> None:
    item = PLAIN["plane"]
    assert kept(CDPruner(relevance="constant"), item, 1) == [0]  # all alike: the lower index
    unlike = torch.full((1, 20), 0.3)
    unlike[0, 13] = -0.4
    assert kept(CDPruner(text_tower="given"), replace(item, relevance=unlike), 1) == [13]
    assert kept(CDPruner(text_tower="given"), replace(item, relevance=torch.ones(1, 20)), 5) == kept(
        CDPruner(relevance="constant"), item, 5
    )


def test_cdpruner_official_scales_relevance_over_the_batch() -> None:
    items = [SQUARE, replace(LANDSCAPE, relevance=LANDSCAPE.relevance + 3)]  # type: ignore[operator]
    similarities = [(-item.relevance.mean(dim=0)).tolist() for item in items]  # type: ignore[union-attr]
    together = [value for similarity in similarities for value in similarity]
    answers = {}
    for compat in ("none", "official"):
        method = CDPruner(text_tower="given", compat=compat)  # type: ignore[arg-type]
        selections = method.compress(items, Budget(9), method.needs(CLIP))
        answers[compat] = [selection.anchor.tolist() for selection in selections]
        for item, similarity, answer in zip(items, similarities, answers[compat], strict=True):
            among = together if compat == "official" else similarity
            assert answer == spanning(item, similarity, min(among), max(among), 9)
        assert (answers[compat][0] == kept(method, SQUARE, 9)) == (compat == "none")
    assert answers["none"] != answers["official"]
    assert method.compress([], Budget(9), method.needs(CLIP)) == []


def test_cdpruner_says_what_it_reads() -> None:
    assert CDPruner(relevance="constant").needs(CLIP).embeddings
    assert (
        not CDPruner(relevance="constant").needs(CLIP).text
        and CDPruner(relevance="constant").needs(CLIP).text_tower is None
    )
    assert CDPruner(relevance="text").needs(CLIP).text
    needs = CDPruner(text_tower="folder").needs(CLIP)
    assert needs.text_tower == "folder" and needs.features and not needs.text
    sick = replace(SQUARE, features=torch.full((80, 3), torch.nan))
    with pytest.raises(InputError, match="NaN or infinity"):
        kept(CDPruner(text_tower="folder"), sick, 5)
    with pytest.raises(SpecError, match=r"text_tower and relevance='text' exclude each other"):
        CDPruner(text_tower="folder", relevance="text")
