"""What holds for every method, by itself for a new one, and each method's own rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from registered import variants
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from mmcompress.budget import Budget, largest_remainder
from mmcompress.errors import InputError, SpecError
from mmcompress.method import VisualMethod
from mmcompress.methods.pool import Pool, pooled_grid
from mmcompress.methods.random import Random
from mmcompress.methods.todre import ToDRE
from mmcompress.methods.uniform import Uniform
from mmcompress.methods.vtc_cls import VTCCLS
from mmcompress.ranking import top_indices
from mmcompress.registry import METHODS
from mmcompress.statistics import NEEDS_CLS, STATISTICS
from mmcompress.types import EncoderFacts, Modality, Needs, Selection, VisualItem

DEPTH, HEADS, DIM = 6, 3, 8
WITH_CLS = EncoderFacts(DEPTH, DEPTH - 1, (1, 3, 4))
WITHOUT_CLS = EncoderFacts(DEPTH, DEPTH, (1, 5), dict.fromkeys(NEEDS_CLS, "no CLS token"))
WIDTHS = {"cls_rows": HEADS, "keys": 12, "key_metric": 4}


def make_item(
    seed: int, grids: tuple[tuple[int, int], ...], tiles: Tensor | None = None, modality: Modality = "image"
) -> VisualItem:
    """An item with random values for every statistic of every layer; one tile per plane unless given."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [rows * columns for rows, columns in grids]
    if tiles is None:
        tiles = torch.arange(len(grids)).repeat_interleave(torch.tensor(sizes))
    tokens = len(tiles)

    def statistic(name: str) -> dict[int, Tensor]:
        shape = (DEPTH, tokens, WIDTHS[name]) if name in WIDTHS else (DEPTH, tokens)
        return dict(enumerate(torch.rand(shape, generator=generator)))

    return VisualItem(
        embeddings=torch.randn(tokens, DIM, generator=generator),
        grids=grids,
        tiles=tiles,
        modality=modality,
        label=f"item {seed}",
        features=torch.randn(tokens, 5, generator=generator),
        text=torch.randn(7, DIM, generator=generator),
        drafted=torch.rand(2, tokens, generator=generator),
        **{name: statistic(name) for name in STATISTICS},
    )


def tiled(seed: int) -> VisualItem:
    """A 4x4 thumbnail, and a 5x7 plane stitched from 2x2 crops of unequal size."""
    row, column = torch.meshgrid(torch.arange(5), torch.arange(7), indexing="ij")
    crops = 1 + (row >= 3) * 2 + (column >= 4)
    tiles = torch.cat([torch.zeros(16, dtype=torch.long), crops.flatten()])
    return replace(make_item(seed, ((4, 4), (5, 7)), tiles), crops=(2, 2))


ITEMS = {
    "plane": make_item(1, ((5, 7),)),
    "tiled": tiled(2),
    "video": make_item(3, ((3, 5),) * 3, modality="video"),
    "line": make_item(4, ((1, 9),)),
    "thumbnail last": make_item(5, ((3, 3),) * 3, torch.tensor([1, 2, 0]).repeat_interleave(9)),
}


def configurations() -> Iterator[Any]:
    """Every method with its defaults and with each other choice of its options, on every encoder that suits it."""
    for spec in variants("pre_llm"):
        method = METHODS.build(spec.name, spec.options)
        for encoder, label in ((WITH_CLS, "CLS"), (WITHOUT_CLS, "no CLS")):
            needs = method.needs(encoder)
            if not set(needs.layers()) & set(encoder.missing):
                yield pytest.param(method, needs, id=f"{spec}-{label}")


CONFIGURATIONS = list(configurations())
every_configuration = pytest.mark.parametrize(("method", "needs"), CONFIGURATIONS)
every_item = pytest.mark.parametrize("item", ITEMS.values(), ids=ITEMS)


def identical(one: Selection, other: Selection) -> bool:
    if (one.weight is None) != (other.weight is None) or not torch.equal(one.anchor, other.anchor):
        return False
    return one.weight is None or other.weight is None or torch.equal(one.weight, other.weight)


def compress(method: VisualMethod, needs: Needs, item: VisualItem, keep: float) -> Selection:
    return method.compress([item], Budget(keep), needs)[0]


def poisoned(item: VisualItem, name: str, layer: int | None, value: float, seed: int = 0) -> VisualItem:
    """The item with one element of one of its inputs replaced."""
    source = getattr(item, name) if layer is None else getattr(item, name)[layer]
    tensor = source.clone()
    at = int(torch.randint(tensor.numel(), (), generator=torch.Generator().manual_seed(seed)))
    tensor.view(-1)[at] = value
    return replace(item, **{name: tensor if layer is None else {**getattr(item, name), layer: tensor}})


def inputs(item: VisualItem) -> set[tuple[str, int | None]]:
    """Everything a method might read, statistics by layer."""
    named = {(name, layer) for name in STATISTICS for layer in getattr(item, name)}
    return named | {("embeddings", None), ("features", None), ("text", None)}


def read(needs: Needs) -> set[tuple[str, int | None]]:
    """What a method with these needs reads."""
    named: set[tuple[str, int | None]] = {(name, layer) for name, layers in needs.layers().items() for layer in layers}
    return named | {(name, None) for name in ("embeddings", "features", "text") if getattr(needs, name)}


def test_every_method_is_here() -> None:
    tested = {values.values[0].info.name for values in CONFIGURATIONS}
    every = {name for name in METHODS.names() if METHODS.get(name).info.stage == "pre_llm"}  # type: ignore[attr-defined]
    assert tested == every >= {"random", "uniform", "pool", "vtc-cls", "todre"}


@every_configuration
@every_item
def test_selections_of_every_budget(method: VisualMethod, needs: Needs, item: VisualItem) -> None:
    for budget in range(1, len(item)):
        selection = compress(method, needs, item, budget)
        anchors = selection.anchor.tolist()
        assert selection.anchor.dtype == torch.long
        assert len(anchors) == budget or (not method.exact_count and 1 <= len(anchors) <= budget)
        assert len(set(anchors)) == len(anchors)
        assert min(anchors) >= 0 and max(anchors) < len(item)
        if selection.weight is not None:
            assert selection.weight.shape == (len(anchors), len(item))
            assert selection.weight.isfinite().all()
            assert (selection.weight[torch.arange(len(anchors)), selection.anchor] > 0).all()


@every_configuration
@every_item
def test_a_budget_that_is_no_reduction_keeps_all(method: VisualMethod, needs: Needs, item: VisualItem) -> None:
    for keep in (len(item), len(item) + 1, 10**6, 1.0):
        assert identical(compress(method, needs, item, keep), Selection(torch.arange(len(item))))


@every_configuration
@every_item
def test_selections_repeat_whatever_the_global_generator_does(
    method: VisualMethod, needs: Needs, item: VisualItem
) -> None:
    for keep in (1, 0.3, 0.9):
        torch.manual_seed(0)
        first = compress(method, needs, item, keep)
        torch.manual_seed(1)
        assert identical(compress(method, needs, item, keep), first)


@every_configuration
@given(order=st.permutations(list(ITEMS.values())), keep=st.integers(1, 60) | st.floats(0.01, 1.0))
@settings(max_examples=10)
def test_neighbours_change_nothing(method: VisualMethod, needs: Needs, order: list[VisualItem], keep: float) -> None:
    together = method.compress(order, Budget(keep), needs)
    for item, selection in zip(order, together, strict=True):
        assert identical(selection, compress(method, needs, item, keep))


@every_configuration
@every_item
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_read_must_be_finite(method: VisualMethod, needs: Needs, item: VisualItem, value: float) -> None:
    healthy = tiled(9)
    for seed, (name, layer) in enumerate(sorted(read(needs), key=str)):
        sick = poisoned(item, name, layer, value, seed)
        budget = 1 + (7 * seed) % (len(item) - 1)
        with pytest.raises(InputError, match=rf"^{item.label}: .*NaN or infinity"):
            method.compress([healthy, sick], Budget(budget), needs)
        assert identical(compress(method, needs, sick, 1.0), Selection(torch.arange(len(item))))


@every_configuration
@every_item
def test_what_is_not_read_may_be_anything(method: VisualMethod, needs: Needs, item: VisualItem) -> None:
    sick = item
    for name, layer in inputs(item) - read(needs):
        value = getattr(item, name) if layer is None else getattr(item, name)[layer]
        nothing = torch.full_like(value, torch.nan)
        sick = replace(sick, **{name: nothing if layer is None else {**getattr(sick, name), layer: nothing}})
    for keep in (1, 0.17, 0.5, len(item) - 1):
        assert identical(compress(method, needs, sick, keep), compress(method, needs, item, keep))


@every_configuration
@every_item
def test_the_item_is_left_alone(method: VisualMethod, needs: Needs, item: VisualItem) -> None:
    def values() -> list[Tensor]:
        sources = sorted(inputs(item), key=str)
        return [getattr(item, name) if layer is None else getattr(item, name)[layer] for name, layer in sources]

    before = [value.clone() for value in values()]
    compress(method, needs, item, 0.4)
    assert all(torch.equal(old, new) for old, new in zip(before, values(), strict=True))


@every_configuration
def test_selections_apply_to_tokens_of_any_type(method: VisualMethod, needs: Needs) -> None:
    item = ITEMS["tiled"]
    half = replace(item, embeddings=item.embeddings.bfloat16())
    selection = compress(method, needs, half, 0.5)
    applied = selection.apply(half.embeddings)
    assert applied.dtype == torch.bfloat16
    assert applied.shape == (len(selection), DIM)
    if selection.weight is None:
        assert torch.equal(applied, half.embeddings[selection.anchor])


# --- random


@given(seed=st.integers(0, 2**31), budget=st.integers(1, 34))
def test_random_is_a_function_of_seed_and_size_and_nested(seed: int, budget: int) -> None:
    method, item = Random(seed=seed), ITEMS["plane"]
    generator = torch.Generator().manual_seed(seed)
    expected = sorted(torch.randperm(len(item), generator=generator)[:budget].tolist())
    kept = compress(method, Needs(), item, budget).anchor.tolist()
    other = make_item(77, ((7, 5),))
    assert kept == expected == compress(method, Needs(), other, budget).anchor.tolist()
    if budget > 1:
        assert set(compress(method, Needs(), item, budget - 1).anchor.tolist()) < set(kept)


def test_random_seeds_differ() -> None:
    assert len({tuple(compress(Random(seed), Needs(), ITEMS["plane"], 8).anchor.tolist()) for seed in range(10)}) == 10


# --- uniform


@pytest.mark.parametrize(
    ("tokens", "budget", "kept"),
    [(9, 3, [1, 4, 7]), (10, 4, [1, 3, 6, 8]), (9, 1, [4]), (5, 4, [0, 1, 3, 4]), (2, 1, [1])],
)
def test_uniform_keeps_the_middles_of_equal_stretches(tokens: int, budget: int, kept: list[int]) -> None:
    item = make_item(0, ((1, tokens),))
    assert compress(Uniform(), Needs(), item, budget).anchor.tolist() == kept
    assert kept == [int((i + 0.5) * tokens / budget) for i in range(budget)]


# --- pool


@pytest.mark.parametrize("grid", [(5, 7), (7, 5), (6, 6), (1, 9), (9, 1), (2, 11)], ids=str)
def test_pool_is_adaptive_average_pooling(grid: tuple[int, int]) -> None:
    item = make_item(1, (grid,))
    plane = item.embeddings.T.view(1, DIM, *grid)
    for budget in range(1, len(item)):
        selection = compress(Pool(), Needs(), item, budget)
        rows, columns = pooled_grid(*grid, budget)
        assert len(selection) == rows * columns
        expected = adaptive_avg_pool2d(plane, (rows, columns))[0].flatten(1).T
        torch.testing.assert_close(selection.apply(item.embeddings), expected)
        centres = [
            int((i + 0.5) * grid[0] / rows) * grid[1] + int((j + 0.5) * grid[1] / columns)
            for i in range(rows)
            for j in range(columns)
        ]
        assert selection.anchor.tolist() == centres


@pytest.mark.parametrize(
    ("grid", "budget", "pooled"),
    [
        ((24, 24), 144, (12, 12)),
        ((24, 24), 143, (11, 11)),
        ((24, 24), 64, (8, 8)),
        ((24, 24), 1, (1, 1)),
        ((10, 20), 50, (5, 10)),
        ((20, 10), 50, (10, 5)),
        ((10, 20), 49, (5, 9)),  # 4.5 rounds up
        ((1, 9), 4, (1, 4)),
        ((4, 4), 0, (0, 0)),
    ],
)
def test_pool_keeps_the_aspect(grid: tuple[int, int], budget: int, pooled: tuple[int, int]) -> None:
    assert pooled_grid(*grid, budget) == pooled


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_pooled_grids_fit_the_budget_and_the_plane(rows: int, columns: int, data: st.DataObject) -> None:
    budget = data.draw(st.integers(1, rows * columns))
    pooled = pooled_grid(rows, columns, budget)
    assert 1 <= pooled[0] <= rows and 1 <= pooled[1] <= columns
    assert pooled[0] * pooled[1] <= budget
    assert pooled_grid(columns, rows, budget) == pooled[::-1]


def test_pool_stays_within_planes_and_their_shares() -> None:
    item = ITEMS["video"]
    budget = 20
    selection = compress(Pool(), Needs(), item, budget)
    shares = largest_remainder(budget, [15, 15, 15])
    planes = selection.anchor // 15
    assert selection.weight is not None
    for plane, share in enumerate(shares):
        mine = planes == plane
        rows, columns = pooled_grid(3, 5, share)
        assert int(mine.sum()) == rows * columns
        frame = item.embeddings[15 * plane : 15 * (plane + 1)].T.view(1, DIM, 3, 5)
        expected = adaptive_avg_pool2d(frame, (rows, columns))[0].flatten(1).T
        torch.testing.assert_close(selection.apply(item.embeddings)[mine], expected)
        outside = torch.cat([selection.weight[mine, : 15 * plane], selection.weight[mine, 15 * (plane + 1) :]], dim=1)
        assert not outside.any()


# --- vtc-cls


def test_vtc_cls_sums_the_papers_layers() -> None:
    assert VTCCLS().needs(EncoderFacts(24, 23, tuple(range(23)))).cls_rows == tuple(range(16, 23))
    assert VTCCLS().needs(EncoderFacts(27, 26, tuple(range(26)))).cls_rows == tuple(range(18, 26))
    assert VTCCLS().needs(EncoderFacts(12, 11, tuple(range(11)))).cls_rows == (8, 9, 10)
    assert VTCCLS().needs(EncoderFacts(2, 1, (0,))).cls_rows == (0,)
    assert VTCCLS(first_layer=3).needs(WITH_CLS).cls_rows == (3, 4)


@pytest.mark.parametrize("first", [-1, 5, 23])
def test_vtc_cls_refuses_layers_that_are_not_used(first: int) -> None:
    with pytest.raises(SpecError, match=rf"first_layer={first} is out of range; this encoder uses layers 0\.\.4"):
        VTCCLS(first_layer=first).needs(WITH_CLS)


def test_vtc_cls_received_reads_global_layers_only() -> None:
    received = VTCCLS(score="received")
    assert received.needs(EncoderFacts(32, 32, (7, 15, 23, 31))).received_attention == (23, 31)
    assert received.needs(EncoderFacts(32, 32, (7, 15))).received_attention == (15,)
    assert received.needs(WITH_CLS).cls_rows == ()


@pytest.mark.parametrize("score", ["cls", "received"])
@pytest.mark.parametrize("budget", [1, 2, 5, 17, 40, 50])
def test_vtc_cls_keeps_the_best_of_every_tile(score: Literal["cls", "received"], budget: int) -> None:
    item, method = ITEMS["tiled"], VTCCLS(first_layer=2, score=score)
    needs = method.needs(WITH_CLS)
    if score == "cls":
        scores = torch.stack([item.cls_rows[layer].mean(dim=1) for layer in (2, 3, 4)]).sum(dim=0)
    else:
        scores = item.received_attention[3] + item.received_attention[4]
    sizes = [int((item.tiles == tile).sum()) for tile in range(5)]
    assert sizes == [16, 12, 9, 8, 6]
    expected = []
    for tile, share in enumerate(largest_remainder(budget, sizes)):
        members = [i for i in range(len(item)) if item.tiles[i] == tile]
        expected += sorted(members, key=lambda i: -float(scores[i]))[:share]
    assert compress(method, needs, item, budget).anchor.tolist() == sorted(expected)


def test_vtc_cls_gives_ties_to_the_lower_index() -> None:
    item = make_item(6, ((24, 24),))
    rows = {layer: (item.cls_rows[layer] > 0.5).float() for layer in range(DEPTH)}
    scores = rows[4].mean(dim=1).tolist()
    for budget in (1, 100, 300, 500):
        kept = compress(VTCCLS(), VTCCLS().needs(WITH_CLS), replace(item, cls_rows=rows), budget)
        assert kept.anchor.tolist() == sorted(sorted(range(576), key=lambda i: (-scores[i], i))[:budget])


def test_top_indices_are_ascending() -> None:
    assert top_indices(torch.tensor([1.0, 5.0, 3.0, 9.0, 3.0]), 3).tolist() == [1, 2, 3]
    assert top_indices(torch.tensor([1.0, 5.0]), 0).tolist() == []


# --- todre


def todre_order(tokens: Tensor, pivot: int, budget: int, objective: str) -> list[int]:
    """Algorithm 1, every similarity anew."""
    unit = normalize(tokens.double(), dim=1)
    order = [pivot]
    while len(order) < budget:
        closeness = unit @ unit[order].T
        total = closeness.sum(dim=1) if objective == "max-sum" else closeness.amax(dim=1)
        total[order] = torch.inf
        order.append(int(total.argmin()))
    return order


@pytest.mark.parametrize("objective", ["max-sum", "k-center"])
@every_item
def test_todre_grows_from_the_pivot(objective: Literal["max-sum", "k-center"], item: VisualItem) -> None:
    method = ToDRE(objective)
    needs = method.needs(WITH_CLS)
    assert needs == Needs(cls_rows=(4,), embeddings=True)
    attention = item.cls_rows[4].mean(dim=1)
    candidates = [i for i in range(len(item)) if item.modality == "video" or item.tiles[i] == 0]
    pivot = max(candidates, key=lambda i: float(attention[i]))
    budget = len(item) // 2
    expected = todre_order(item.embeddings, pivot, budget, objective)
    assert method.selection_orders([item], [budget], needs)[0].tolist() == expected
    assert compress(method, needs, item, budget).anchor.tolist() == sorted(expected)


def test_todre_never_takes_a_crop_for_the_pivot() -> None:
    item = ITEMS["tiled"]
    loud = replace(item, cls_rows={4: torch.where((item.tiles == 0)[:, None], item.cls_rows[4], 99.0)})
    needs = ToDRE().needs(WITH_CLS)
    kept = compress(ToDRE(), needs, loud, 1).anchor
    assert item.tiles[kept] == 0
    assert torch.equal(kept, compress(ToDRE(), needs, item, 1).anchor)


def test_todre_takes_the_pivot_from_any_frame() -> None:
    item = ITEMS["video"]
    attention = item.cls_rows[4].clone()
    attention[37] = 99.0
    needs = ToDRE().needs(WITH_CLS)
    assert compress(ToDRE(), needs, replace(item, cls_rows={4: attention}), 1).anchor.tolist() == [37]


@every_item
def test_todre_without_cls_starts_farthest_from_the_mean(item: VisualItem) -> None:
    needs = ToDRE().needs(WITHOUT_CLS)
    assert needs == Needs(embeddings=True)
    unit = normalize(item.embeddings.double(), dim=1)
    pivot = int((unit @ unit.mean(dim=0)).argmin())
    (order,) = ToDRE().selection_orders([item], [6], needs)
    assert order.tolist() == todre_order(item.embeddings, pivot, 6, "max-sum")


@pytest.mark.parametrize(
    ("anchor", "weight", "problem"),
    [
        ([0, 1], None, "2 tokens for a budget of 3"),
        ([0, 1, 2, 3], None, "4 tokens for a budget of 3"),
        ([0, 0, 1], None, "anchors that repeat or lie outside 0..8"),
        ([0, 1, 9], None, "anchors that repeat or lie outside 0..8"),
        ([-1, 0, 1], None, "anchors that repeat or lie outside 0..8"),
        ([0.0, 1.0, 2.0], None, "anchors of type torch.float32"),
        ([0, 1, 2], torch.ones(3, 8), r"weights of shape \[3, 8\] instead of \[3, 9\]"),
    ],
)
def test_a_wrong_selection_is_an_error(anchor: list[float], weight: Tensor | None, problem: str) -> None:
    @dataclasses.dataclass(frozen=True)
    class Wrong(Uniform):
        def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
            return Selection(torch.tensor(anchor), weight)

    with pytest.raises(SpecError, match=f"method 'uniform' returned {problem}"):
        Wrong().compress([make_item(0, ((3, 3),))], Budget(3), Needs())


def test_an_explicit_layer_is_never_replaced() -> None:
    encoder = EncoderFacts(DEPTH, DEPTH, (1, 3))
    assert VTCCLS(score="received").needs(encoder).received_attention == (3,)
    with pytest.raises(SpecError, match=r"no layer from 4 on attends to the whole image; \(1, 3\) do"):
        VTCCLS(score="received", first_layer=4).needs(encoder)
