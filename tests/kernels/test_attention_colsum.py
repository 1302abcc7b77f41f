"""Normalisers and weighted column sums of causal attention."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mmcompress import ops
from mmcompress.kernels.attention_colsum import naive, reference

# batch, heads, kv_heads, queries, keys, dim
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 6, 2, 3, 17, 5),
    (1, 2, 1, 129, 130, 8),
    (3, 5, 5, 7, 7, 3),
    (1, 4, 4, 9, 4, 2),
]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """With deterministic algorithms on, torch fills what `torch.empty` returns with NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def arguments(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, float, Tensor]:
    """Queries, keys, scaling, and last keys of a causal row whose first queries see nothing if there are few keys."""
    batch, heads, kv_heads, queries, keys, dim = shape
    generator = torch.Generator().manual_seed(sum(shape))
    query = torch.randn(batch, heads, queries, dim, generator=generator).to(dtype)
    key = torch.randn(batch, kv_heads, keys, dim, generator=generator).to(dtype)
    return query, key, 3 * dim**-0.5, torch.arange(keys - queries, keys).clamp(min=-1)


def weights(query: Tensor) -> Tensor:
    return torch.rand(query.shape[:3], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_against_ground_truth(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = arguments(shape, dtype)
    lse, weight = ops.attention_lse(*given), weights(given[0])
    torch.testing.assert_close(lse, naive.attention_lse(*given), rtol=2e-5, atol=1e-5)
    expected = naive.weighted_colsum(*given, lse, weight)
    assert expected.isfinite().all() and lse.dtype == torch.float32
    torch.testing.assert_close(ops.weighted_colsum(*given, lse, weight), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("block", [1, 2, 7, 64])
def test_the_block_does_not_matter(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments((2, 4, 2, 9, 11, 6))
    lse, weight = ops.attention_lse(*given), weights(given[0])
    whole = ops.weighted_colsum(*given, lse, weight)
    monkeypatch.setattr(reference, "BLOCK", block)
    torch.testing.assert_close(ops.attention_lse(*given), lse)
    torch.testing.assert_close(ops.weighted_colsum(*given, lse, weight), whole)


def test_a_sum_of_rows() -> None:
    query, key, scaling, last_key = arguments((2, 4, 2, 9, 11, 6))
    lse, weight = ops.attention_lse(query, key, scaling, last_key), weights(query)
    rows = ops.attention_rows(query, key, scaling, last_key)
    sums = ops.weighted_colsum(query, key, scaling, last_key, lse, weight)
    torch.testing.assert_close(sums, (weight[..., None] * rows).sum(dim=2))
    torch.testing.assert_close(sums.sum(dim=-1), weight.sum(dim=-1))
    everything = torch.full_like(last_key, key.shape[2] - 1)
    lse = ops.attention_lse(query, key, scaling, everything)
    alike = ops.weighted_colsum(query, key, scaling, everything, lse, torch.ones_like(weight))
    torch.testing.assert_close(alike.sum(dim=1), ops.attention_colsum(query, key, scaling))


def test_columns_that_are_not_wanted_are_left_out() -> None:
    query, key, scaling, last_key = arguments((2, 4, 2, 9, 13, 6))
    lse, weight = ops.attention_lse(query, key, scaling, last_key), weights(query)
    whole = ops.weighted_colsum(query, key, scaling, last_key, lse, weight)
    part = ops.weighted_colsum(query, key[:, :, 4:], scaling, last_key - 4, lse, weight)
    torch.testing.assert_close(part, whole[..., 4:])


def test_large_logits_are_finite() -> None:
    query, key, _, last_key = arguments((1, 2, 1, 4, 5, 3))
    lse = ops.attention_lse(1e4 * query, key, 1.0, last_key)
    sums = ops.weighted_colsum(1e4 * query, key, 1.0, last_key, lse, weights(query))
    torch.testing.assert_close(sums.sum(dim=-1), weights(query).sum(dim=-1), rtol=1e-2, atol=0)
