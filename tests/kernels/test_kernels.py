"""Every op against its ground truth, on awkward shapes."""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcompress import ops
from mmcompress.kernels.greedy_select import rows

FOLDER = Path(__file__).parents[2] / "kernels"
OPS = sorted(path.parent.name for path in FOLDER.glob("*/naive.py"))
DTYPES = [torch.float32, torch.bfloat16]
# batch, heads, kv_heads, queries, keys, dim
ATTENTION_SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 6, 2, 3, 17, 5),
    (1, 4, 1, 129, 31, 8),
    (3, 5, 5, 7, 1, 3),
    (1, 2, 2, 300, 13, 7),
]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """With deterministic algorithms on, torch fills what `torch.empty` returns with NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def implementations(op: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`(reference, naive)`."""
    reference, naive = (importlib.import_module(f"mmcompress.kernels.{op}.{name}") for name in ("reference", "naive"))
    return getattr(reference, op), getattr(naive, op)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_every_op_has_ground_truth_and_its_tests_here() -> None:
    folders = sorted(path.name for path in FOLDER.iterdir() if path.is_dir() and path.name != "__pycache__")
    assert folders == sorted([*OPS, "dispatch"])


@pytest.mark.parametrize("name", ops.__all__)
def test_ops_is_the_door_to_all_implementations(name: str) -> None:
    (op,) = (op for op in OPS if hasattr(importlib.import_module(f"mmcompress.kernels.{op}"), name))
    modules = [f"mmcompress.kernels.{op}.{module}" for module in ("naive", "reference")]
    if find_spec("triton"):
        modules.append(f"mmcompress.kernels.{op}.triton")
    signatures = [inspect.signature(getattr(importlib.import_module(module), name)) for module in modules]
    assert all(signature == inspect.signature(getattr(ops, name)) for signature in signatures)


@pytest.mark.parametrize("op", ["attention_rows", "attention_colsum"])
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(op: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, heads, kv_heads, queries, keys, dim = shape
    query, key = randn(batch, heads, queries, dim, dtype=dtype), randn(batch, kv_heads, keys, dim, seed=1, dtype=dtype)
    reference, naive = implementations(op)
    expected = naive(query, key, dim**-0.5)
    assert not expected.isnan().any()
    actual = reference(query, key, dim**-0.5)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("block", [1, 2, 7, 64])
def test_colsum_does_not_depend_on_the_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = randn(2, 4, 9, 6), randn(2, 2, 11, 6, seed=1)
    reference, naive = implementations("attention_colsum")
    monkeypatch.setitem(reference.__globals__, "BLOCK", block)
    torch.testing.assert_close(reference(query, key, 0.4), naive(query, key, 0.4))


def test_colsum_is_the_sum_of_rows() -> None:
    query, key = randn(2, 4, 9, 6), randn(2, 2, 11, 6, seed=1)
    rows = ops.attention_rows(query, key, 0.4)
    torch.testing.assert_close(rows.sum(dim=-1), torch.ones(2, 4, 9))
    torch.testing.assert_close(ops.attention_colsum(query, key, 0.4), rows.sum(dim=(1, 2)))


def test_attention_of_large_logits_is_finite() -> None:
    query = randn(1, 2, 3, 4) * 1e4
    for op in ("attention_rows", "attention_colsum"):
        reference, naive = implementations(op)
        assert reference(query, query, 1.0).isfinite().all()
        torch.testing.assert_close(reference(query, query, 1.0), naive(query, query, 1.0))


def greedy(select: Callable[..., list[Tensor]], tokens: Tensor, count: int, pivot: int | None, objective: str) -> Any:
    """The order for one image."""
    pivots = None if pivot is None else [torch.tensor(pivot)]
    (order,) = select([tokens], [count], pivots, objective)
    assert order.dtype == torch.long
    return order.tolist()


@pytest.mark.parametrize("objective", ["max-sum", "k-center"])
@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (17, 5), (53, 32)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_greedy_select(objective: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    reference, naive = implementations("greedy_select")
    tokens = randn(*shape, seed=sum(shape), dtype=dtype)
    for count, pivot in itertools.product({1, (len(tokens) + 1) // 2, len(tokens)}, {0, len(tokens) - 1}):
        order = greedy(reference, tokens, count, pivot, objective)
        assert order[0] == pivot
        assert order == greedy(naive, tokens, count, pivot, objective)
        assert len(set(order)) == count


@pytest.mark.parametrize("objective", ["max-sum", "k-center"])
def test_greedy_select_gives_ties_to_the_lower_index(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Signed unit vectors have exact cosines, so every tie is a true one.
    tokens = torch.eye(4)[[0, 1, 0, 2, 1, 3, 0, 2]] * torch.tensor([1, 1, -1, 1, 1, 1, -1, -1])[:, None]
    reference, naive = implementations("greedy_select")
    for pivot in range(len(tokens)):
        order = greedy(reference, tokens, len(tokens), pivot, objective)
        assert order == greedy(naive, tokens, len(tokens), pivot, objective)
        assert sorted(order) == list(range(len(tokens)))
    assert greedy(reference, torch.ones(5, 3), 4, 2, objective) == [2, 0, 1, 3]
    twice = randn(40, 16)[torch.arange(80) % 40]
    assert greedy(reference, twice, 60, 5, objective) == greedy(naive, twice, 60, 5, objective)
    monkeypatch.setattr(rows, "FEW", 79)
    assert greedy(reference, twice, 60, 5, objective) == greedy(naive, twice, 60, 5, objective)


@pytest.mark.parametrize(("ahead", "few"), [(1, 0), (5, 16), (5, 17), (32, 40), (32, 1024)])
@pytest.mark.parametrize("shape", [(1, 3), (3, 7), (17, 5), (53, 32)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_greedy_select_finds_a_pivot(
    ahead: int, few: int, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, naive = implementations("greedy_select")
    monkeypatch.setattr(rows, "AHEAD", ahead)
    monkeypatch.setattr(rows, "FEW", few)
    tokens = randn(*shape, seed=sum(shape), dtype=dtype)
    order = greedy(reference, tokens, len(tokens), None, "k-center")
    assert order == greedy(naive, tokens, len(tokens), None, "k-center")
    assert order == greedy(reference, tokens, len(tokens), order[0], "k-center")


def test_greedy_select_starts_with_the_loneliest() -> None:
    # Exact cosines: 0 and 1, 2 and 4 are pairs, 3 is at right angles to all, 5 is opposite to the first pair.
    tokens = torch.eye(4)[[0, 0, 1, 2, 1, 0]] * torch.tensor([1, 1, 1, 1, 1, -1])[:, None]
    for implementation in implementations("greedy_select"):
        assert greedy(implementation, tokens, 4, None, "k-center") == [3, 0, 2, 5]
        assert greedy(implementation, tokens[[5, 0, 1]], 1, None, "k-center") == [0]
        assert greedy(implementation, tokens[:2], 1, None, "k-center") == [0]


def test_the_objectives_differ() -> None:
    # After 0 and 165 degrees: 200 is far from the pivot and so has the lower sum, 90 is far from its nearest.
    angles = torch.deg2rad(torch.tensor([0.0, 165.0, 90.0, 200.0]))
    tokens = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert greedy(ops.greedy_select, tokens, 3, 0, "max-sum") == [0, 1, 3]
    assert greedy(ops.greedy_select, tokens, 3, 0, "k-center") == [0, 1, 2]


@pytest.mark.parametrize("objective", ["max-sum", "k-center", "pivot"])
@pytest.mark.parametrize(("ahead", "few"), [(1, 0), (3, 9), (8, 16), (32, 1024)])
@pytest.mark.parametrize("held_bytes", [0, 4 * 4 * 53 * 7, 2**30])
def test_greedy_select_does_not_depend_on_the_batch_nor_on_what_is_held(
    objective: str, ahead: int, few: int, held_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, naive = implementations("greedy_select")
    monkeypatch.setattr(rows, "AHEAD", ahead)
    monkeypatch.setattr(rows, "FEW", few)
    monkeypatch.setattr(rows, "HELD_BYTES", held_bytes)
    tokens, counts = [randn(17, 5), randn(53, 32), randn(1, 3), randn(9, 4)], [5, 31, 1, 9]
    pivots = None if objective == "pivot" else [torch.tensor(pivot) for pivot in (16, 0, 0, 3)]
    objective = "k-center" if objective == "pivot" else objective
    orders, expected = (select(tokens, counts, pivots, objective) for select in (reference, naive))
    assert [order.tolist() for order in orders] == [order.tolist() for order in expected]
    assert reference([], [], pivots and [], objective) == []


def test_rows_are_held_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "AHEAD", 3)
    monkeypatch.setattr(rows, "FEW", 10)
    monkeypatch.setattr(rows, "HELD_BYTES", 2 * 4 * 20 * 7)  # seven rows of the larger of two images
    images = [randn(20, 6), randn(11, 6, seed=1)]
    reader, scores = rows.Rows(images, [20, 11]), randn(2, 20, seed=2)
    for step, token in enumerate(torch.randperm(20).tolist()):
        read = reader.read(step, torch.tensor([token, token % 11]), scores)
        torch.testing.assert_close(read[0], images[0] @ images[0][token])
        expected = images[1] @ images[1][token % 11] if step < 11 else torch.zeros(11)
        torch.testing.assert_close(read[1], torch.cat([expected, torch.zeros(9)]))
        assert 0 < len(reader.held[0]) <= 7


@pytest.mark.parametrize("op", ["attention_rows", "attention_colsum", "greedy_select"])
def test_inputs_are_left_alone(op: str) -> None:
    arguments: list[Any] = [randn(1, 4, 3, 2), randn(1, 2, 5, 2), 1.0]
    if op == "greedy_select":
        arguments = [[randn(9, 4)], [5], [torch.tensor(2)], "max-sum"]
    before = copy.deepcopy(arguments)
    implementations(op)[0](*arguments)
    torch.testing.assert_close(arguments[:3], before[:3], rtol=0, atol=0)
