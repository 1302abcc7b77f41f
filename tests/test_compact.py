"""Removing tokens from padded batches, against loops over rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmcompress.compact import ragged_index, spread, take

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool]


@st.composite
def kept(draw: st.DrawFn) -> Tensor:
    """A mask `[batch, length]` that keeps at least one column of every row."""
    length = draw(st.integers(1, 12))
    row = st.lists(st.booleans(), min_size=length, max_size=length).filter(any)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=4)))


def rows_of(keep: Tensor) -> list[list[int]]:
    """The kept columns of each row."""
    return [[column for column, stays in enumerate(row) if stays] for row in keep.tolist()]


def padded(rows: list[list[int]], pad_left: bool) -> list[list[int]]:
    """Rows of columns filled up with -1."""
    longest = max(map(len, rows))
    fill = [[-1] * (longest - len(row)) for row in rows]
    return [pad + row if pad_left else row + pad for pad, row in zip(fill, rows, strict=True)]


@given(kept(), st.booleans())
def test_ragged_index(keep: Tensor, pad_left: bool) -> None:
    index = ragged_index(keep, pad_left)
    assert index.dtype == torch.long
    assert index.tolist() == padded(rows_of(keep), pad_left)


@given(kept(), st.booleans(), st.sampled_from([(), (3,), (2, 3)]), st.sampled_from(DTYPES))
def test_take(keep: Tensor, pad_left: bool, tail: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = (torch.randn(*keep.shape, *tail, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    taken = take(tensor, ragged_index(keep, pad_left))
    assert taken.dtype == dtype
    for row, columns in enumerate(padded(rows_of(keep), pad_left)):
        for slot, column in enumerate(columns):
            expected = tensor[row, column] if column >= 0 else torch.zeros(tail, dtype=dtype)
            assert torch.equal(taken[row, slot], expected)


@given(kept(), st.booleans())
def test_take_puts_zeros_at_pads_whatever_lies_there(keep: Tensor, pad_left: bool) -> None:
    index = ragged_index(keep, pad_left)
    taken = take(torch.full((*keep.shape, 2), torch.nan), index)
    assert torch.equal(taken[index < 0], torch.zeros(int((index < 0).sum()), 2))


@given(kept(), st.booleans())
def test_spread_repeats_the_kept_token_before(keep: Tensor, pad_left: bool) -> None:
    index = ragged_index(keep, pad_left)
    tensor = torch.arange(keep.numel(), dtype=torch.float32).view(*keep.shape, 1).expand(-1, -1, 2)
    compact = take(tensor, index).masked_fill((index < 0)[..., None], torch.nan)  # pads must never be read
    out = spread(compact, keep, index)
    for row, columns in enumerate(rows_of(keep)):
        for column in range(keep.shape[1]):
            source = max((c for c in columns if c <= column), default=columns[0])
            assert torch.equal(out[row, column], tensor[row, source])


@pytest.mark.parametrize("pad_left", [False, True])
def test_keeping_all_changes_nothing(pad_left: bool) -> None:
    keep = torch.ones(2, 5, dtype=torch.bool)
    index = ragged_index(keep, pad_left)
    tensor = torch.randn(2, 5, 3)
    assert torch.equal(index, torch.arange(5).expand(2, 5))
    assert torch.equal(take(tensor, index), tensor)
    assert torch.equal(spread(tensor, keep, index), tensor)


def test_a_row_that_keeps_nothing_does_no_harm() -> None:
    keep = torch.tensor([[False, False, False], [True, False, True]])
    index = ragged_index(keep, pad_left=True)
    assert index.tolist() == [[-1, -1], [0, 2]]
    assert spread(torch.ones(2, 2, 1), keep, index).shape == (2, 3, 1)
