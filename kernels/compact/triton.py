"""One pass: what stays is read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _gather(
    tensor,
    index,
    out,
    kept,
    width,
    batch_stride,
    row_stride,
    index_batch,
    index_row,
    KEPT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    batch, slot = tl.program_id(2), tl.program_id(0) * KEPT + tl.arange(0, KEPT)
    place = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    row = tl.load(index + batch * index_batch + slot * index_row, slot < kept, -1)
    there = (row >= 0)[:, None] & (place < width)[None, :]
    values = tl.load(tensor + batch * batch_stride + row[:, None] * row_stride + place[None, :], there, 0)
    line = batch * kept + slot
    tl.store(out + line[:, None] * width + place[None, :], values, (slot < kept)[:, None] & (place < width)[None, :])


def compact(tensor: Tensor, index: Tensor) -> Tensor:
    """See `reference.compact`."""
    batch, kept = index.shape
    out = tensor.new_empty(batch, kept, *tensor.shape[2:])
    rows = tensor.reshape(batch, tensor.shape[1], -1)
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    width = rows.shape[2]
    block_width = min(1024, triton.next_power_of_2(width))
    block_kept = max(1, min(BLOCK // block_width, triton.next_power_of_2(kept)))
    source, target = (part.view(torch.uint8) if tensor.dtype == torch.bool else part for part in (rows, out))
    _gather[triton.cdiv(kept, block_kept), triton.cdiv(width, block_width), batch](
        source,
        index,
        target,
        kept,
        width,
        *rows.stride()[:2],
        *index.stride(),
        KEPT=block_kept,
        WIDTH=block_width,
    )
    return out
