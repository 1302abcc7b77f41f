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
