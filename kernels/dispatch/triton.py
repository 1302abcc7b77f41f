"""What kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def multiply(left, right, total):
    """Add the product of two blocks to `total`, in float32 without rounding to TF32."""
    if INTERPRETED:  # where bfloat16 is held as integers, which `tl.dot` would multiply
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def vectors(first, there, dim, stride, width):
    """What `first` points at the beginnings of, in rows `[vectors, dim]`; zeros where nothing is `there`."""
    return tl.load(first[:, None] + dim[None, :] * stride, there[:, None] & (dim < width)[None, :], 0.0)


@triton.jit
def vectors_across(first, there, dim, stride, width):
    """The same in columns `[dim, vectors]`."""
    return tl.load(first[None, :] + dim[:, None] * stride, there[None, :] & (dim < width)[:, None], 0.0)


@triton.jit
def keys_seen(row, there, column, keys, last_key, first_key, HAS_LAST: tl.constexpr, HAS_FIRST: tl.constexpr):
    """Which keys the rows that are `there` see `[rows, keys]`; none behind the end."""
    seen = there[:, None] & (column < keys)[None, :]
    if HAS_LAST:
        seen &= column[None, :] <= tl.load(last_key + row, there, -1)[:, None]
    if HAS_FIRST:
        seen &= column[None, :] >= tl.load(first_key + row, there, 0)[:, None]
    return seen
