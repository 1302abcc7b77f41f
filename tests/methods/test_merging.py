"""The rules of methods that merge at the encoder's output, by plain loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mmcompress.budget import Budget, largest_remainder
from mmcompress.errors import SpecError
from mmcompress.merging import soft_match
from mmcompress.methods.aim import AIM, halving_steps
from mmcompress.methods.prumerge import PruMerge, outlier_ratio
from mmcompress.methods.prumerge_plus import PruMergePlus
from mmcompress.methods.visionzip import VisionZip
from mmcompress.types import EncoderFacts, Modality, Needs, Selection, VisualItem

CLIP_L = EncoderFacts(24, 23, tuple(range(23)))
SMALL = EncoderFacts(3, 2, (0, 1))
METHODS: list[Any] = [VisionZip, PruMerge, PruMergePlus, AIM]

Vector = list[float]


def item_of(seed: int, sizes: tuple[int, ...], modality: Modality = "image") -> VisualItem:
    """Tiles of `sizes` tokens whose attention sums to less than 1, as that of a CLS token over patches does."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(sizes)

    def values(*shape: int) -> dict[int, Tensor]:
        return {layer: torch.randn(*shape, generator=generator) for layer in range(SMALL.depth)}

    return VisualItem(
        embeddings=torch.randn(tokens, 6, generator=generator),
        grids=tuple((1, size) for size in sizes),
        tiles=torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
        modality=modality,
        cls_rows={layer: rows.softmax(dim=0) * 0.8 for layer, rows in values(tokens, 2).items()},
        cls_rows_full_width={layer: rows.softmax(dim=0) * 0.8 for layer, rows in values(tokens).items()},
        received_attention={layer: rows.softmax(dim=0) for layer, rows in values(tokens).items()},
        keys=values(tokens, 8),
        key_metric=values(tokens, 4),
        features=torch.randn(tokens, 5, generator=generator),
    )


ITEMS = {
    "plane": item_of(1, (36,)),
    "tiles": item_of(2, (16, 12, 9, 8, 6)),
    "frames": item_of(3, (15, 15, 15), "video"),
    "tiny": item_of(4, (4,)),
    "slivers": item_of(5, (9, 1, 2)),
}
every_item = pytest.mark.parametrize("item", ITEMS.values(), ids=ITEMS)


def compress(method: Any, item: VisualItem, budget: int, encoder: EncoderFacts = SMALL) -> Selection:
    return method.compress([item], Budget(budget), method.needs(encoder))[0]


def rows_of(selection: Selection) -> dict[int, Vector]:
    """The weights of every output by its anchor, in output order."""
    return dict(zip(selection.anchor.tolist(), selection.weight.tolist(), strict=True))


def by_tile(item: VisualItem, budget: int, rule: Any) -> dict[int, Vector]:
    """`rule(members, share)` of every tile, which gives anchor -> {token: weight}; as rows in raster order."""
    sizes = torch.bincount(item.tiles).tolist()
    found: dict[int, dict[int, float]] = {}
    for tile, share in enumerate(largest_remainder(budget, sizes)):
        if share:
            found |= rule([i for i in range(len(item)) if item.tiles[i] == tile], share)
    return {anchor: [found[anchor].get(i, 0.0) for i in range(len(item))] for anchor in sorted(found)}


def assert_rows(selection: Selection, expected: dict[int, Vector]) -> None:
    rows = rows_of(selection)
    assert list(rows) == list(expected)
    for anchor, row in expected.items():
        assert rows[anchor] == pytest.approx(row, abs=1e-6)


def nearest(keys: Tensor, token: int, others: list[int]) -> list[int]:
    """`others` by falling similarity of keys to `token`, lower index first among equals."""
    similarity = cosine_similarity(keys[token][None].double(), keys[others].double())
    return [others[i] for i in sorted(range(len(others)), key=lambda i: (-float(similarity[i]), i))]


# --- all


@pytest.mark.parametrize("cls", METHODS)
def test_what_is_merged_is_what_is_read(cls: Any) -> None:
    published, other = cls(), cls(space="projected")
    assert published.space == "pre_projector" and other.space == "projected"
    for method, features in ((published, True), (other, False)):
        needs = method.needs(CLIP_L)
        assert needs.features is features and needs.embeddings is not features


@pytest.mark.parametrize("cls", METHODS)
@every_item
def test_outputs_are_in_raster_order(cls: Any, item: VisualItem) -> None:
    for budget in range(1, len(item)):
        anchors = compress(cls(), item, budget).anchor
        assert len(anchors) == budget and (anchors.diff() > 0).all()


def test_the_papers_layers() -> None:
    assert VisionZip().needs(CLIP_L) == Needs(cls_rows=(22,), key_metric=(22,), features=True)
    assert PruMerge().needs(CLIP_L) == PruMergePlus().needs(CLIP_L)
    assert PruMerge().needs(CLIP_L) == Needs(cls_rows_full_width=(23,), keys=(23,), features=True)
    assert AIM().needs(CLIP_L) == Needs(keys=(23,), features=True)
    assert AIM(space="projected").needs(CLIP_L) == Needs(embeddings=True)


@pytest.mark.parametrize(
    ("build", "problem"),
    [
        (lambda: VisionZip(contextual=1.1), "visionzip: contextual=1.1"),
        (lambda: VisionZip(contextual=-0.1), "visionzip: contextual=-0.1"),
        (lambda: PruMerge(neighbours=-1), "prumerge: neighbours=-1"),
        (lambda: PruMergePlus(neighbours=-1), "prumerge-plus: neighbours=-1"),
        (lambda: PruMergePlus(sampled=1.5), "prumerge-plus: sampled=1.5"),
    ],
)
def test_options_out_of_range(build: Any, problem: str) -> None:
    with pytest.raises(SpecError, match=f"{problem} is out of range"):
        build()


# --- bipartite soft matching


@pytest.mark.parametrize("protected", [0, 1, 3])
@pytest.mark.parametrize("tokens", [2, 7, 12])
def test_soft_match_by_plain_loops(tokens: int, protected: int) -> None:
    metric = torch.randn(3, tokens, 4, generator=torch.Generator().manual_seed(tokens))
    values = torch.randn(3, tokens, 2, generator=torch.Generator().manual_seed(1))
    even = [i for i in range(0, tokens, 2)]
    free = [i for i in even if i >= protected]
    odd = list(range(1, tokens, 2))
    for count in range(len(free) + 1 if odd else 0):
        matching = soft_match(metric, count, protected)
        for row in range(3):
            match = {a: nearest(metric[row], a, odd)[0] for a in even}
            closeness = {a: float(cosine_similarity(metric[row, a], metric[row, match[a]], dim=0)) for a in even}
            ranked = sorted(free, key=lambda a: -closeness[a]) + [a for a in even if a < protected]
            merged, kept = ranked[:count], (sorted(ranked[count:]) if protected else ranked[count:]) + odd
            assert matching.kept[row].tolist() == kept
            expected = [[k, *(a for a in merged if match[a] == k)] for k in kept]
            assert matching.counts[row].tolist() == [len(group) for group in expected]
            groups = [int(matching.group[row, i]) for i in range(tokens)]
            assert groups == [next(n for n, group in enumerate(expected) if i in group) for i in range(tokens)]
            total = torch.stack([values[row, group].sum(dim=0) for group in expected])
            torch.testing.assert_close(matching.sum(values)[row], total)
            torch.testing.assert_close(matching.mean(values)[row], total / matching.counts[row][:, None])


def test_soft_match_gives_ties_to_the_lower_index() -> None:
    matching = soft_match(torch.ones(8, 3), 2)
    assert matching.kept.tolist() == [4, 6, 1, 3, 5, 7]
    assert matching.group.tolist() == [2, 2, 2, 3, 0, 4, 1, 5]


# --- visionzip


def visionzip_rows(item: VisualItem, budget: int, contextual: float, scores: Tensor, keys: Tensor) -> dict[int, Vector]:
    def rule(members: list[int], share: int) -> dict[int, dict[int, float]]:
        count = round(share * contextual)
        ranked = sorted(members, key=lambda i: (-float(scores[i]), i))
        rest = sorted(ranked[share - count :])
        targets = rest[:: max(1, len(rest) // count)][:count] if count else []
        joined: dict[int, list[int]] = {target: [] for target in targets}
        for token in rest if targets else ():
            if token not in joined:
                joined[nearest(keys, token, targets)[0]].append(token)
        rows = {i: {i: 1.0} for i in ranked[: share - count]}
        return rows | {t: {t: 1.0} | {i: 1 / len(others) for i in others} for t, others in joined.items()}

    return by_tile(item, budget, rule)


@pytest.mark.parametrize("contextual", [10 / 64, 0.5, 0.0, 1.0])
@every_item
def test_visionzip_by_plain_loops(item: VisualItem, contextual: float) -> None:
    scores, keys = item.cls_rows[1].sum(dim=1), item.key_metric[1]
    for budget in range(1, len(item)):
        selection = compress(VisionZip(contextual=contextual), item, budget)
        assert_rows(selection, visionzip_rows(item, budget, contextual, scores, keys))


@every_item
def test_visionzip_by_received_attention(item: VisualItem) -> None:
    method = VisionZip(score="received")
    windowed = EncoderFacts(3, 3, (0,), {"cls_rows": "no CLS token"})
    assert method.needs(windowed) == Needs(received_attention=(0,), key_metric=(2,), features=True)
    budget = len(item) // 2
    expected = visionzip_rows(item, budget, 10 / 64, item.received_attention[0], item.key_metric[2])
    assert_rows(compress(method, item, budget, windowed), expected)


@pytest.mark.parametrize(("kept", "contextual"), [(64, 10), (128, 20), (192, 30), (32, 5), (1, 0), (4, 1)])
def test_visionzip_splits_as_published(kept: int, contextual: int) -> None:
    assert VisionZip().contextual_count(kept) == contextual
    item = item_of(7, (576,))
    rows = compress(VisionZip(), item, kept).weight
    assert int((rows.sum(dim=1) > 1.5).sum()) == contextual
    assert (rows.count_nonzero(dim=0) == 1).sum() == (576 if contextual else kept), "a token goes into one output"


def test_visionzip_official_order() -> None:
    """The thumbnail, then what is dominant in any crop by place, then what is contextual crop by crop."""
    crops = [1 + (row >= 2) * 2 + (column >= 3) for row in range(4) for column in range(5)]
    item = replace(item_of(7, (9, 20)), tiles=torch.tensor([0] * 9 + crops), crops=(2, 2), grids=((3, 3), (4, 5)))
    plain, official = VisionZip(contextual=0.4), VisionZip(contextual=0.4, compat="official")
    merged = plain.merge(item, 14, plain.needs(SMALL))
    groups: dict[str, list[int]] = {"thumbnail": [], "dominant": [], "contextual": []}
    for tile, share in enumerate(largest_remainder(14, torch.bincount(item.tiles).tolist())):
        anchors = [i for i in merged.anchor.tolist() if item.tiles[i] == tile]
        dominant = share - round(share * 0.4)
        groups["thumbnail" if tile == 0 else "dominant"] += anchors[:dominant]
        groups["thumbnail" if tile == 0 else "contextual"] += anchors[dominant:]
    selection = compress(official, item, 14)
    order = groups["thumbnail"] + sorted(groups["dominant"]) + groups["contextual"]
    assert selection.anchor.tolist() == order != sorted(order)
    assert groups["dominant"] != sorted(groups["dominant"]), "crops share the rows of their plane"
    assert rows_of(selection) == rows_of(compress(plain, item, 14))
    frames = ITEMS["frames"]
    assert compress(official, frames, 9).anchor.tolist() == plain.merge(frames, 9, plain.needs(SMALL)).anchor.tolist()


def test_visionzip_adds_the_mean_of_what_joins() -> None:
    tokens = 6
    item = replace(
        ITEMS["plane"],
        embeddings=torch.eye(tokens),
        grids=((2, 3),),
        tiles=torch.zeros(tokens, dtype=torch.long),
        cls_rows={1: torch.tensor([[0.0, 0.1], [0.9, 0.9], [0.1, 0.0], [0.2, 0.0], [0.0, 0.2], [0.1, 0.1]])},
        key_metric={1: torch.tensor([[1.0, 0.0], [9.0, 9.0], [0.9, 0.1], [0.0, 1.0], [0.8, -0.1], [0.1, 0.7]])},
    )
    # Token 1 is dominant. Of 0 2 3 4 5, every second becomes contextual, two at most: 0 and 3.
    selection = compress(VisionZip(contextual=0.7), item, 3)
    assert selection.anchor.tolist() == [0, 1, 3]
    assert selection.weight.tolist() == [[1, 0, 0.5, 0, 0.5, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 1]]


# --- prumerge


def prumerge_rows(item: VisualItem, budget: int, neighbours: int, keep: Any) -> dict[int, Vector]:
    """`keep(attention by member, share)` gives the kept members."""
    attention, keys = item.cls_rows_full_width[2], item.keys[2]

    def rule(members: list[int], share: int) -> dict[int, dict[int, float]]:
        kept = keep({i: float(attention[i]) for i in members}, share)
        dropped = [i for i in members if i not in kept]
        rows = {}
        for i in kept:
            near = nearest(keys, i, [j for j in members if j != i])[:neighbours] if len(members) > 1 else []
            rows[i] = {i: 1.0} | {j: float(attention[j]) for j in near}
        pooled = max(dropped, key=lambda j: (float(attention[j]), -j))
        return rows | {pooled: {j: float(attention[j]) for j in dropped}}

    return by_tile(item, budget, rule)


def ranked(attention: dict[int, float]) -> list[int]:
    return sorted(attention, key=lambda i: (-attention[i], i))


@pytest.mark.parametrize("neighbours", [32, 3, 0])
@every_item
def test_prumerge_by_plain_loops(item: VisualItem, neighbours: int) -> None:
    for budget in range(1, len(item)):
        selection = compress(PruMerge(neighbours=neighbours), item, budget)
        expected = prumerge_rows(item, budget, neighbours, lambda attention, share: ranked(attention)[: share - 1])
        assert_rows(selection, expected)


def test_prumerge_of_one_token_pools_everything() -> None:
    item = ITEMS["plane"]
    attention = item.cls_rows_full_width[2]
    selection = compress(PruMerge(), item, 1)
    assert selection.anchor.tolist() == [int(attention.argmax())]
    assert torch.equal(selection.weight, attention[None])


def official_count(attention: dict[int, float]) -> int:
    values = np.array(list(attention.values()), dtype=np.float32)
    first, third = np.percentile(values, [25, 75])
    return int((values > third + 1.5 * (third - first)).sum())


@pytest.mark.parametrize("budget", [4, 30, 40])
def test_prumerge_official_counts_outliers(budget: int) -> None:
    item = item_of(8, (40, 30))
    item.cls_rows_full_width[2][[3, 17, 20, 50]] += 1.0
    method = PruMerge(compat="official")
    assert not method.exact_count and PruMerge().exact_count
    selection = compress(method, item, budget)
    expected = prumerge_rows(
        item, budget, 32, lambda attention, share: ranked(attention)[: min(share - 1, official_count(attention))]
    )
    assert {anchor: rows_of(selection)[anchor] for anchor in sorted(expected)} == {
        anchor: pytest.approx(row, abs=1e-6) for anchor, row in expected.items()
    }
    attention = item.cls_rows_full_width[2]
    counts = [official_count(dict(enumerate(part.tolist()))) for part in (attention[:40], attention[40:])]
    assert counts[0] >= 3 and counts[1] >= 1
    if budget == 40:  # in the authors' order: most attended first, the pooled token of the tile last
        assert len(selection) == sum(counts) + 2
        assert (attention[selection.anchor[: counts[0]]].diff() < 0).all()
        assert set(selection.anchor[: counts[0]].tolist()) >= {3, 17, 20}


def test_no_outliers_leave_the_pooled_token() -> None:
    item = item_of(9, (20,))
    item.cls_rows_full_width[2] = torch.linspace(0.01, 0.05, 20)
    assert outlier_ratio(item.cls_rows_full_width[2]) == 0
    assert compress(PruMerge(compat="official"), item, 9).anchor.tolist() == [19]
    assert compress(PruMergePlus(compat="official"), item, 9).anchor.tolist() == [0, 19]


# --- prumerge-plus


def plus_keep(sampled: float) -> Any:
    def keep(attention: dict[int, float], share: int) -> list[int]:
        members = list(attention)
        count = min(int(share * sampled), max(0, share - 2))
        grid = [members[i * len(members) // count] for i in range(count)]
        return [i for i in ranked(attention) if i not in grid][: max(0, share - 1 - count)] + grid

    return keep


@pytest.mark.parametrize("sampled", [0.75, 0.3, 0.0, 1.0])
@every_item
def test_prumerge_plus_by_plain_loops(item: VisualItem, sampled: float) -> None:
    for budget in range(1, len(item)):
        selection = compress(PruMergePlus(sampled=sampled), item, budget)
        assert_rows(selection, prumerge_rows(item, budget, 32, plus_keep(sampled)))


@pytest.mark.parametrize(("kept", "step", "top"), [(128, 6, 31), (256, 3, 63)])
def test_prumerge_plus_samples_as_published(kept: int, step: int, top: int) -> None:
    item = item_of(10, (576,))
    attention = item.cls_rows_full_width[2]
    grid = list(range(0, 575, step))
    best = [i for i in ranked(dict(enumerate(attention.tolist()))) if i not in grid][: top + 1]
    assert compress(PruMergePlus(), item, kept).anchor.tolist() == sorted(grid + best)


def test_prumerge_plus_keeps_an_attended_token_where_there_is_room() -> None:
    item = ITEMS["plane"]
    first, second = ranked(dict(enumerate(item.cls_rows_full_width[2].tolist())))[:2]
    assert compress(PruMergePlus(), item, 1).anchor.tolist() == [first]
    assert compress(PruMergePlus(), item, 2).anchor.tolist() == sorted([first, second])
    assert first in compress(PruMergePlus(), item, 3).anchor.tolist()


@pytest.mark.parametrize(("tokens", "budget"), [(576, 575), (600, 599), (100, 99), (100, 20)])
def test_prumerge_plus_official_samples_by_outliers(tokens: int, budget: int) -> None:
    item = item_of(11, (tokens,))
    item.cls_rows_full_width[2][: tokens // 25] += torch.linspace(0.5, 1.0, tokens // 25)
    attention = dict(enumerate(item.cls_rows_full_width[2].tolist()))
    count = official_count(attention)
    top = ranked(attention)[:count]
    step = int(int(1 / (count / tokens)) / 3)
    assert step > 1
    sampled = [i for i in range(0, min(575, tokens), step) if i not in top]
    kept = (top + sampled)[: budget - 1]
    assert 576 not in kept or 576 in top
    assert compress(PruMergePlus(compat="official"), item, budget).anchor.tolist()[:-1] == kept


# --- aim


@pytest.mark.parametrize(
    ("tokens", "budget", "steps"),
    [
        (576, 252, [288, 36]),
        (576, 72, [288, 144, 72]),
        (196, 49, [98, 49]),
        (196, 25, [98, 49, 24]),
        (576, 500, [76]),
        (7, 1, [3, 1, 1, 1]),
        (7, 7, []),
        (2, 1, [1]),
    ],
)
def test_aim_halves_as_published(tokens: int, budget: int, steps: list[int]) -> None:
    assert halving_steps(tokens, budget) == steps


def aim_rows(item: VisualItem, budget: int, metric: Tensor) -> dict[int, Vector]:
    """Steps on lists of (anchor, metric, weights), every mean a plain one."""

    def rule(members: list[int], share: int) -> dict[int, dict[int, float]]:
        tokens = [(i, metric[i].double(), {i: 1.0}) for i in members]
        number = 0
        while len(tokens) > share:
            number += 1
            count = min(max(1, len(members) // 2**number), len(tokens) - share)
            odd = list(range(1, len(tokens), 2))
            similar = {}
            for a in range(0, len(tokens), 2):
                similar[a] = max((float(cosine_similarity(tokens[a][1], tokens[b][1], dim=0)), -b) for b in odd)
            order = sorted(similar, key=lambda a: (-similar[a][0], a))
            groups = [[b, *(a for a in order[:count] if -similar[a][1] == b)] for b in odd]
            means = []
            for group in groups:
                weights: dict[int, float] = {}
                for member in group:
                    for i, weight in tokens[member][2].items():
                        weights[i] = weights.get(i, 0.0) + weight / len(group)
                mean = torch.stack([tokens[member][1] for member in group]).mean(dim=0)
                means.append((tokens[group[0]][0], mean, weights))
            tokens = [tokens[a] for a in order[count:]] + means
        return {anchor: weights for anchor, _, weights in tokens}

    return by_tile(item, budget, rule)


@every_item
def test_aim_by_plain_loops(item: VisualItem) -> None:
    for budget in range(1, len(item)):
        assert_rows(compress(AIM(), item, budget), aim_rows(item, budget, item.keys[2]))
        assert_rows(compress(AIM(space="projected"), item, budget), aim_rows(item, budget, item.embeddings))


def test_aim_merges_means_of_means() -> None:
    angles = torch.tensor([0.00, 0.01, 1.50, 0.10, 0.12, 1.40])
    item = replace(item_of(12, (6,)), embeddings=torch.stack([angles.cos(), angles.sin()], dim=1))
    # The matches are 0 -> 1, 4 -> 3, 2 -> 5, by falling similarity.
    selection = AIM(space="projected").merge(item, 3, Needs(embeddings=True))
    assert halving_steps(6, 3) == [3]
    assert selection.anchor.tolist() == [1, 3, 5]
    selection = AIM(space="projected").merge(item, 4, Needs(embeddings=True))
    assert selection.anchor.tolist() == [2, 1, 3, 5]
    assert selection.weight.tolist() == [
        [0, 0, 1, 0, 0, 0],
        [0.5, 0.5, 0, 0, 0, 0],
        [0, 0, 0, 0.5, 0.5, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    # A second step puts the means of 0, 1 and of 3, 4 together.
    weights = compress(AIM(space="projected"), item, 2).weight
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2))
    assert sorted(weights.amax(dim=0).tolist()) == pytest.approx([0.25, 0.25, 0.25, 0.25, 0.5, 0.5])


def test_frames_merge_apart_with_equal_budgets() -> None:
    item = ITEMS["frames"]
    selection = compress(AIM(space="projected"), item, 20)
    frame = selection.anchor // 15
    assert torch.bincount(frame).tolist() == largest_remainder(20, [15, 15, 15])
    for number in range(3):
        outside = torch.ones(len(item), dtype=torch.bool)
        outside[15 * number : 15 * (number + 1)] = False
        assert not selection.weight[frame == number][:, outside].any()
    alone = compress(AIM(space="projected"), replace(item, embeddings=item.embeddings.roll(15, 0)), 21)
    together = compress(AIM(space="projected"), item, 21)
    assert torch.equal(alone.anchor[alone.anchor >= 15], together.anchor[together.anchor < 30] + 15)
