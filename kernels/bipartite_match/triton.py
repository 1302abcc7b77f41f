"""A matching that holds no matrix of similarities, and sums that always add in the same order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompress.kernels.dispatch.triton import multiply, vectors, vectors_across

ROWS, OTHERS, DIM = 64, 64, 64
WIDTH = 256


@triton.jit
def _nearest(
    left,
    right,
    left_norm,
    right_norm,
    best,
    nearest,
    lengths,
    rows,
    others,
    width,
    left_batch,
    left_row,
    right_batch,
    right_row,
    HAS_LENGTHS: tl.constexpr,
    ITSELF: tl.constexpr,
    ROWS: tl.constexpr,
    OTHERS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Largest cosine of each row of `left` with one of `right`, and which; not the same row unless `ITSELF`."""
    batch, row = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    left += batch * left_batch
    right += batch * right_batch
    length = tl.load(left_norm + batch * rows + row, row < rows, 1.0)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    which = tl.zeros([ROWS], tl.int32)
    end = others
    if HAS_LENGTHS:
        end = tl.load(lengths + batch)
    for start in range(0, end, OTHERS):
        other = start + tl.arange(0, OTHERS)
        product = tl.zeros([ROWS, OTHERS], tl.float32)
        for first in range(0, width, DIM):
            dim = first + tl.arange(0, DIM)
            one = vectors(left + row * left_row, row < rows, dim, 1, width)
            two = vectors_across(right + other * right_row, other < others, dim, 1, width)
            product = multiply(one, two, product)
        other_length = tl.load(right_norm + batch * others + other, other < others, 1.0)
        cosine = product / (length[:, None] * other_length[None, :])
        possible = (other < end)[None, :]
        if not ITSELF:
            possible &= row[:, None] != other[None, :]
        cosine = tl.where(possible, cosine, float("-inf"))
        larger, at = tl.max(cosine, 1, return_indices=True)
        which = tl.where(larger > largest, start + at, which)
        largest = tl.maximum(larger, largest)
    tl.store(best + batch * rows + row, largest, row < rows)
    tl.store(nearest + batch * rows + row, which, row < rows)


@triton.jit
def _merge(values, order, first, out, tokens, outputs, width, WIDTH: tl.constexpr, TYPE: tl.constexpr):
    line, place = tl.program_id(0), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    batch = line // outputs
    total = tl.zeros([WIDTH], TYPE)
    begin, end = tl.load(first + batch + line), tl.load(first + batch + line + 1)
    for member in range(begin, end):
        token = batch * tokens + tl.load(order + batch * tokens + member)
        total += tl.load(values + token * width + place, place < width, 0).to(TYPE)
    tl.store(out + line * width + place, total, place < width)


def nearest_of(left: Tensor, right: Tensor, itself: bool, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The largest cosine of each vector with one of others, and which one that is; `[batch, rows]` each.

    Args:
        left: `[batch, rows, dim]`, the last dimension dense.
        right: `[batch, others, dim]`, likewise.
        itself: whether it may be the one of the same number.
        lengths: `[batch]`, how many of the others there are; all if it is None.
    """
    batch, rows, width = left.shape
    best = left.new_empty(batch, rows, dtype=torch.float32)
    nearest = left.new_empty(batch, rows, dtype=torch.long)
    norms = [torch.linalg.vector_norm(part.float(), dim=-1).clamp(min=1e-12) for part in (left, right)]
    _nearest[triton.cdiv(rows, ROWS), batch](
        left,
        right,
        *norms,
        best,
        nearest,
        lengths,
        rows,
        right.shape[1],
        width,
        *left.stride()[:2],
        *right.stride()[:2],
        HAS_LENGTHS=lengths is not None,
        ITSELF=itself,
        ROWS=ROWS,
        OTHERS=OTHERS,
        DIM=DIM,
    )
    return best, nearest


def bipartite_match(metric: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.bipartite_match`."""
    lead = metric.shape[:-2]
    flat = metric.reshape(-1, *metric.shape[-2:])
    flat = flat if flat.stride(2) == 1 else flat.contiguous()
    best, nearest = nearest_of(flat[:, ::2], flat[:, 1::2], itself=True)
    return best.view(*lead, -1), nearest.view(*lead, -1)


def merge_tokens(values: Tensor, group: Tensor, outputs: int) -> Tensor:
    """See `reference.merge_tokens`."""
    *lead, tokens, width = values.shape
    out = values.new_empty(*lead, outputs, width)
    group = group.reshape(-1, tokens)
    sorted_group, order = group.sort(dim=-1, stable=True)
    edges = torch.arange(outputs + 1, device=group.device).expand(len(group), -1).contiguous()
    first = torch.searchsorted(sorted_group, edges)
    _merge[len(group) * outputs, triton.cdiv(width, WIDTH)](
        values.contiguous(),
        order,
        first,
        out,
        tokens,
        outputs,
        width,
        WIDTH=min(WIDTH, triton.next_power_of_2(width)),
        TYPE=tl.float32 if values.is_floating_point() else tl.int64,
    )
    return out
