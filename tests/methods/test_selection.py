"""Methods that pick tokens of an image, each against a plain reading of its rule."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from mmcompress.budget import Budget, largest_remainder
from mmcompress.errors import SpecError
from mmcompress.method import VisualMethod
from mmcompress.methods import holov, vispruner
from mmcompress.methods.divprune import DivPrune
from mmcompress.methods.fastervlm import FasterVLM
from mmcompress.methods.hiprune import HiPrune
from mmcompress.methods.holov import HoloV
from mmcompress.methods.vispruner import VisPruner
from mmcompress.registry import METHODS
from mmcompress.types import EncoderFacts, Modality, Needs, VisualItem

DEPTH = 6
ENCODER = EncoderFacts(DEPTH, DEPTH - 1, (1, 3, 4))
CLIP_L = EncoderFacts(24, 23, tuple(range(23)))
QWEN25_VL = EncoderFacts(32, 32, (7, 15, 23, 31))

Score = Literal["cls", "received"]
both_scores = pytest.mark.parametrize("score", ["cls", "received"])


def make_item(
    seed: int, grids: tuple[tuple[int, int], ...], tiles: Tensor | None = None, modality: Modality = "image"
) -> VisualItem:
    """Random values of all that these methods read; one tile per plane unless given."""
    generator = torch.Generator().manual_seed(seed)
    if tiles is None:
        tiles = torch.arange(len(grids)).repeat_interleave(torch.tensor([rows * columns for rows, columns in grids]))
    tokens = len(tiles)
    return VisualItem(
        embeddings=torch.randn(tokens, 8, generator=generator),
        grids=grids,
        tiles=tiles,
        modality=modality,
        cls_rows=dict(enumerate(torch.rand(DEPTH, tokens, 3, generator=generator))),
        received_attention=dict(enumerate(torch.rand(DEPTH, tokens, generator=generator))),
        features=torch.randn(tokens, 5, generator=generator),
    )


def tiled(seed: int) -> VisualItem:
    """A 4x4 thumbnail, and a 5x7 plane stitched from 2x2 crops of 12, 9, 8 and 6 tokens."""
    crops = [1 + (row >= 3) * 2 + (column >= 4) for row in range(5) for column in range(7)]
    return make_item(seed, ((4, 4), (5, 7)), torch.tensor([0] * 16 + crops))


ITEMS = {
    "plane": make_item(1, ((5, 7),)),
    "tiled": tiled(2),
    "video": make_item(3, ((3, 5),) * 3, modality="video"),
    "line": make_item(4, ((1, 9),)),
    "tiny": make_item(5, ((2, 2),)),
    "thumbnail last": make_item(6, ((3, 3),) * 3, torch.tensor([1, 2, 0]).repeat_interleave(9)),
}
every_item = pytest.mark.parametrize("item", ITEMS.values(), ids=ITEMS)


def keep(method: VisualMethod, item: VisualItem, budget: int) -> list[int]:
    selection = method.compress([item], Budget(budget), method.needs(ENCODER))[0]
    assert selection.weight is None
    return selection.anchor.tolist()


def shares(item: VisualItem, budget: int) -> list[tuple[list[int], int]]:
    """Indices of each tile's tokens, and how many of them stay."""
    members = [[i for i in range(len(item)) if item.tiles[i] == tile] for tile in range(int(item.tiles.max()) + 1)]
    return list(zip(members, largest_remainder(budget, [len(tile) for tile in members]), strict=True))


def attention(item: VisualItem, score: Score) -> list[float]:
    values = item.cls_rows[4].mean(dim=1) if score == "cls" else item.received_attention[4]
    return values.tolist()  # type: ignore[no-any-return]


def cosines(vectors: Tensor) -> list[list[float]]:
    lengths = vectors.double().norm(dim=1)
    return (vectors.double() @ vectors.double().T / lengths / lengths[:, None]).tolist()  # type: ignore[no-any-return]


def line(**statistics: Any) -> VisualItem:
    """A 1 x n item with given values, `cls_rows` those of one head in layer 4."""
    given: dict[str, Any] = {name: torch.tensor(values) for name, values in statistics.items()}
    tokens = len(next(iter(given.values())))
    if "cls_rows" in given:
        given["cls_rows"] = {4: given["cls_rows"][:, None]}
    return replace(make_item(0, ((1, tokens),)), **given)


# --- the layer that attention is read from


@pytest.mark.parametrize("name", ["fastervlm", "vispruner", "holov"])
def test_attention_is_read_where_the_llm_sees_the_output(name: str) -> None:
    assert METHODS.build(name, {}).needs(CLIP_L).layers() == {"cls_rows": (22,)}
    assert METHODS.build(name, {}).needs(ENCODER).layers() == {"cls_rows": (4,)}
    received = METHODS.build(name, {"score": "received"})
    assert received.needs(CLIP_L).layers() == {"received_attention": (22,)}
    assert received.needs(QWEN25_VL).layers() == {"received_attention": (31,)}
    assert received.needs(EncoderFacts(32, 32, (7, 15))).layers() == {"received_attention": (15,)}


def test_what_is_read_beside_attention() -> None:
    assert FasterVLM().needs(CLIP_L) == Needs(cls_rows=(22,))
    assert VisPruner().needs(CLIP_L) == Needs(cls_rows=(22,), features=True)
    assert HoloV().needs(CLIP_L) == Needs(cls_rows=(22,), embeddings=True)
    assert DivPrune().needs(CLIP_L) == Needs(embeddings=True)


# --- fastervlm


@both_scores
@every_item
def test_fastervlm_keeps_the_most_attended_of_every_tile(item: VisualItem, score: Score) -> None:
    scores = attention(item, score)
    for budget in range(1, len(item)):
        expected = []
        for members, share in shares(item, budget):
            expected += sorted(members, key=lambda i: -scores[i])[:share]
        assert keep(FasterVLM(score), item, budget) == sorted(expected)


def test_fastervlm_averages_heads_and_gives_ties_to_the_lower_index() -> None:
    rows = torch.tensor([[0.0, 0.9], [0.5, 0.5], [0.6, 0.4], [0.1, 0.2], [0.8, 0.2]])
    item = replace(make_item(0, ((1, 5),)), cls_rows={4: rows})
    assert keep(FasterVLM(), item, 1) == [1]
    assert keep(FasterVLM(), item, 2) == [1, 2]
    assert keep(FasterVLM(), item, 4) == [0, 1, 2, 4]


# --- vispruner


def vispruner_reading(
    item: VisualItem, budget: int, score: Score, ratio: float, step: int, similarity: list[list[float]]
) -> list[int]:
    scores, kept = attention(item, score), []
    for members, share in shares(item, budget):
        ranked = sorted(members, key=lambda i: -scores[i])
        important = int(share * ratio)
        kept += ranked[:important]
        residual, target = ranked[important:], share - important
        while target and len(residual) > target:
            first, second = residual[0::2], residual[1::2]
            assert len(first) == math.ceil(len(residual) / 2)
            worst = sorted(first, key=lambda i: -max(similarity[i][j] for j in second))
            residual = worst[min(step, len(residual) - target) :] + second
        kept += residual[:target]
    return sorted(kept)


@both_scores
@every_item
@pytest.mark.parametrize(("ratio", "step"), [(0.5, 8), (0.5, 1), (0.3, 3), (0.0, 8), (1.0, 8)])
def test_vispruner_removes_duplicates(item: VisualItem, score: Score, ratio: float, step: int) -> None:
    method = VisPruner(ratio, step, score)
    assert item.features is not None
    similarity = cosines(item.features)
    for budget in {1, 2, 3, len(item) // 4 + 1, len(item) // 2, len(item) - 1}:
        assert keep(method, item, budget) == vispruner_reading(item, budget, score, ratio, step, similarity)


@pytest.mark.parametrize(("nearest", "rows_at_once"), [(1, 2), (3, 5)])
def test_vispruner_does_not_depend_on_how_many_neighbours_it_knows(
    nearest: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [keep(VisPruner(prune_per_step=2), ITEMS["plane"], budget) for budget in range(1, 35)]
    monkeypatch.setattr(vispruner, "NEAREST", nearest)
    monkeypatch.setattr(vispruner, "ROWS_AT_ONCE", rows_at_once)
    assert [keep(VisPruner(prune_per_step=2), ITEMS["plane"], budget) for budget in range(1, 35)] == expected


def test_vispruner_by_hand() -> None:
    # Attention falls from 0 to 5. After the important 0, the others are dealt out as 1 3 5 and 2 4; 3 doubles 4,
    # 1 is much like 2, and 5 somewhat.
    features = [[1.0, 0, 0], [0.1, 1, 0], [-0.3, 1, 0], [0, 0, 1], [0, 0, 1], [-1, 0, 0]]
    item = line(cls_rows=[0.9, 0.5, 0.4, 0.3, 0.2, 0.1], features=features)
    assert keep(VisPruner(0.2), item, 5) == [0, 1, 2, 4, 5]
    assert keep(VisPruner(0.25), item, 4) == [0, 2, 4, 5]
    # One at a time, 1 5 2 4 are dealt out anew as 1 2 and 5 4 once 3 is gone, and 2 is the more like 5.
    assert keep(VisPruner(0.25, prune_per_step=1), item, 4) == [0, 1, 4, 5]


def test_vispruner_compares_features_not_embeddings() -> None:
    item = ITEMS["plane"]
    assert keep(VisPruner(), item, 9) == keep(VisPruner(), replace(item, embeddings=item.embeddings.flip(0)), 9)
    assert item.features is not None
    assert keep(VisPruner(), item, 9) != keep(VisPruner(), replace(item, features=item.features.flip(0)), 9)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"important_ratio": 1.01}, r"important_ratio=1.01 must be in \[0, 1\]"),
        ({"important_ratio": -0.5}, r"important_ratio=-0.5 must be in \[0, 1\]"),
        ({"prune_per_step": 0}, "prune_per_step=0 must be at least 1"),
    ],
)
def test_vispruner_refuses(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecError, match=f"vispruner: {problem}"):
        METHODS.build("vispruner", options)


# --- hiprune


@pytest.mark.parametrize(
    ("encoder", "layers"),
    [
        (CLIP_L, (8, 22)),
        (QWEN25_VL, (15, 31)),  # 8 of 24 is 11 of 32, as near to 7 as to 15
        (EncoderFacts(27, 26, tuple(range(26))), (9, 25)),
        (EncoderFacts(32, 32, (7, 31)), (7, 31)),
        (EncoderFacts(24, 23, (8, 20)), (8, 20)),
        (ENCODER, (3, 4)),
        (EncoderFacts(2, 2, (0, 1)), (0, 1)),  # never one layer for both where there are two
        (EncoderFacts(2, 1, (0,)), (0,)),
    ],
)
def test_hiprune_reads_the_papers_layers(encoder: EncoderFacts, layers: tuple[int, ...]) -> None:
    assert HiPrune().needs(encoder) == Needs(received_attention=layers)


def test_hiprune_reads_the_layers_that_are_given() -> None:
    assert HiPrune(object_layer=1).needs(ENCODER).received_attention == (1, 4)
    assert HiPrune(deep_layer=3).needs(ENCODER).received_attention == (1, 3)
    assert HiPrune(object_layer=4, deep_layer=1).needs(ENCODER).received_attention == (4, 1)
    assert HiPrune(object_layer=3, deep_layer=3).needs(ENCODER).received_attention == (3,)


@pytest.mark.parametrize("layer", [-1, 0, 2, 5, 23])
@pytest.mark.parametrize("name", ["object_layer", "deep_layer"])
def test_hiprune_refuses_layers_that_do_not_see_the_image(name: str, layer: int) -> None:
    with pytest.raises(SpecError, match=rf"{name}={layer} does not attend to the whole image; layers \(1, 3, 4\) do"):
        METHODS.build("hiprune", {name: layer}).needs(ENCODER)


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_hiprune_refuses_an_alpha_that_is_no_fraction(alpha: float) -> None:
    with pytest.raises(SpecError, match=rf"alpha={alpha} must be in \[0, 1\]"):
        HiPrune(alpha=alpha)


def hiprune_reading(item: VisualItem, budget: int, alpha: float, widths: dict[int, int]) -> list[int]:
    shallow, deep, kept = item.received_attention[1].tolist(), item.received_attention[4].tolist(), []
    for tile, (members, share) in enumerate(shares(item, budget)):
        places = range(len(members))
        anchors = sorted(places, key=lambda i: -shallow[members[i]])[: round(share * alpha / 5)]
        steps = (-1, 1, -widths[tile], widths[tile])
        buffers = {min(max(i + step, 0), len(members) - 1) for i in anchors for step in steps} - set(anchors)
        chosen = anchors + sorted(buffers, key=lambda i: -deep[members[i]])[: share - len(anchors)]
        registers = sorted(set(places) - set(chosen), key=lambda i: -deep[members[i]])[: share - len(chosen)]
        kept += [members[i] for i in [*chosen, *registers]]
    return sorted(kept)


WIDTHS = {
    "plane": {0: 7},
    "tiled": {0: 4, 1: 4, 2: 3, 3: 4, 4: 3},
    "video": {0: 5, 1: 5, 2: 5},
    "line": {0: 9},
    "tiny": {0: 2},
    "thumbnail last": {0: 3, 1: 3, 2: 3},
}


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("name", ITEMS)
def test_hiprune_keeps_anchors_buffers_and_registers(name: str, alpha: float) -> None:
    item = ITEMS[name]
    for budget in range(1, len(item)):
        kept = keep(HiPrune(alpha, object_layer=1), item, budget)
        assert kept == hiprune_reading(item, budget, alpha, WIDTHS[name])


def test_hiprune_by_hand() -> None:
    def kept(anchor: int, budget: int) -> list[int]:
        received = {1: torch.eye(20)[anchor], 4: torch.arange(20) / 100}
        item = replace(make_item(0, ((4, 5),)), received_attention=received)
        return keep(HiPrune(alpha=0.5, object_layer=1), item, budget)  # one anchor where 10 stay, none where 5 do

    registers = [15, 16, 17, 18, 19]
    assert kept(7, 10) == [2, 6, 7, 8, 12, *registers]
    assert kept(7, 5) == registers
    assert kept(5, 10) == [0, 4, 5, 6, 10, *registers]  # left of a row's first token stands the last of the row above
    assert kept(2, 10) == [0, 1, 2, 3, 7, *registers]  # above the first row stands the first token
    assert kept(17, 10) == list(range(10, 20))  # 12 and 16 to 19, then what is left


# --- holov


def holov_reading(
    item: VisualItem, budget: int, score: Score, chunks: int | None, alpha: float, official: bool
) -> list[int]:
    similarity, scores, kept = cosines(item.embeddings), attention(item, score), []
    for members, share in shares(item, budget):
        if share:
            kept += holov_tile(members, share, similarity, scores, chunks, alpha, official)
    return kept if official else sorted(kept)


def holov_tile(
    members: list[int],
    budget: int,
    similarity: list[list[float]],
    scores: list[float],
    chunks: int | None,
    alpha: float,
    official: bool,
) -> list[int]:
    count = min(chunks or max(1, 1024 * len(members) // (576 * budget)), len(members))
    size, longer = divmod(len(members), count)
    parts, rest = [], members
    for c in range(count):
        parts.append(rest[: size + (c < longer)])
        rest = rest[size + (c < longer) :]
    assert not rest
    quality = []
    for part in parts:
        others, variances = max(len(part) - 1, 1), []
        for i in part:
            row = [0.0 if i == j else similarity[i][j] for j in part]
            mean = sum(row) / others
            variances.append(sum((s - mean) ** 2 for s in row) / others)
        mine = [1000 * scores[i] for i in part]
        scale = sum(mine) / len(part) / (sum(variances) / len(part) + 1e-6)
        quality.append(sum(a + alpha * v * scale for a, v in zip(mine, variances, strict=True)) / len(part))
    allotted = [0] * count
    while sum(allotted) < budget:
        left = budget - sum(allotted)
        roomy = [c for c in range(count) if allotted[c] < len(parts[c])]
        whole = sum(quality[c] for c in roomy) + 1e-6
        extra = {c: math.floor(quality[c] / whole * left) for c in roomy}
        for c in sorted(roomy, key=lambda c: -quality[c])[: left - sum(extra.values())]:
            extra[c] += 1
        for c in roomy:
            allotted[c] = min(allotted[c] + extra[c], len(parts[c]))
        if official:
            break
    kept = []
    for part, room in zip(parts, allotted, strict=True):
        kept += part if room == len(part) else sorted(part, key=lambda i: -scores[i])[:room]
    return kept


@both_scores
@every_item
@pytest.mark.parametrize("compat", ["none", "official"])
@pytest.mark.parametrize(("chunks", "alpha"), [(None, 0.09), (1, 0.09), (3, 2.0), (100, 0.0)])
def test_holov_shares_over_chunks(
    item: VisualItem, score: Score, compat: Literal["none", "official"], chunks: int | None, alpha: float
) -> None:
    method = HoloV(chunks, alpha, score, compat)
    # To the power of six, attention differs enough between chunks to fill some of them.
    item = replace(
        item,
        cls_rows={4: item.cls_rows[4] ** 6},
        received_attention={4: item.received_attention[4] ** 6},
    )
    for budget in {1, 2, len(item) // 3 + 1, len(item) // 2, 3 * len(item) // 4, len(item) - 1}:
        expected = holov_reading(item, budget, score, chunks, alpha, compat == "official")
        assert keep(method, item, budget) == expected
        assert compat == "official" or len(expected) == budget


def test_holov_hands_on_what_a_chunk_cannot_hold() -> None:
    item = line(cls_rows=[6.0, 7.0, 8.0, 9.0, 0.1, 0.4, 0.3, 0.2], embeddings=torch.eye(8).tolist())
    ours, theirs = HoloV(chunks=2), HoloV(chunks=2, compat="official")
    assert ours.exact_count and not theirs.exact_count
    assert keep(ours, item, 6) == [0, 1, 2, 3, 5, 6]
    assert keep(theirs, item, 6) == [0, 1, 2, 3]  # a whole chunk in raster order, what it has no room for is lost
    assert keep(ours, item, 3) == [1, 2, 3]
    assert keep(theirs, item, 3) == [3, 2, 1]


def test_holov_gives_more_to_the_chunk_whose_similarities_vary() -> None:
    # Attention is alike. Orthogonal tokens have no variance; equal ones have, as their own place counts as zero.
    embeddings = torch.cat([torch.eye(4), torch.ones(4, 4)]).tolist()
    item = line(cls_rows=[0.4, 0.3, 0.2, 0.1] * 2, embeddings=embeddings)
    assert keep(HoloV(chunks=2, alpha=1.0), item, 3) == [0, 4, 5]
    assert keep(HoloV(chunks=2, alpha=0.0), item, 3) == [0, 1, 4]


def test_holov_fills_up_where_no_attention_guides_it() -> None:
    item = line(cls_rows=[0.0] * 9, embeddings=torch.eye(9).tolist())
    for budget in range(1, 9):
        assert len(keep(HoloV(chunks=2), item, budget)) == budget
    assert keep(HoloV(chunks=3), item, 4) == [0, 1, 3, 6]


@pytest.mark.parametrize(
    ("tokens", "budget", "chunks"), [(576, 64, 16), (576, 128, 8), (391, 87, 7), (576, 576 // 2, 3)]
)
def test_holov_has_16_chunks_where_64_of_576_stay(tokens: int, budget: int, chunks: int) -> None:
    item = make_item(0, ((1, tokens),))
    assert keep(HoloV(), item, budget) == keep(HoloV(chunks), item, budget)
    assert keep(HoloV(), item, budget) != keep(HoloV(chunks + 1), item, budget)
    assert keep(HoloV(), item, budget) != keep(HoloV(chunks - 1), item, budget)


def test_similarity_variance_does_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = torch.nn.functional.normalize(torch.randn(2, 11, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    whole = holov._similarity_variance(unit)
    monkeypatch.setattr(holov, "ROWS_AT_ONCE", 4)
    torch.testing.assert_close(holov._similarity_variance(unit), whole)


@pytest.mark.parametrize(
    ("options", "problem"),
    [({"chunks": 0}, "chunks=0 must be at least 1"), ({"alpha": -0.1}, "alpha=-0.1 must be at least 0")],
)
def test_holov_refuses(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecError, match=f"holov: {problem}"):
        METHODS.build("holov", options)


# --- divprune


@every_item
def test_divprune_is_greedy_max_min(item: VisualItem) -> None:
    tokens = range(len(item))
    distance = [[1 - similarity for similarity in row] for row in cosines(item.embeddings)]
    order = [max(tokens, key=lambda i: min(distance[i][j] for j in tokens if j != i))]
    while len(order) < len(item):
        rest = [i for i in tokens if i not in order]
        order.append(max(rest, key=lambda i: min(distance[i][j] for j in order)))
    assert DivPrune().selection_orders([item], [len(item)])[0].tolist() == order
    for budget in range(1, len(item)):
        assert keep(DivPrune(), item, budget) == sorted(order[:budget])


def test_divprune_starts_with_the_loneliest_token() -> None:
    # One alone at 225 degrees, then the one farthest from it, then the one farther from both.
    angles = torch.deg2rad(torch.tensor([0.0, 12.0, 80.0, 90.0, 225.0]))
    item = line(embeddings=torch.stack([angles.cos(), angles.sin()], dim=1).tolist())
    assert DivPrune().selection_orders([item], [4])[0].tolist() == [4, 1, 3, 0]
    assert keep(DivPrune(), item, 2) == [1, 4]


def test_divprune_pools_all_tiles() -> None:
    item = ITEMS["tiled"]
    embeddings = torch.ones(len(item), 8)
    embeddings[torch.tensor([20, 21, 25, 26])] = torch.eye(8)[:4]
    assert keep(DivPrune(), replace(item, embeddings=embeddings), 4) == [20, 21, 25, 26]
