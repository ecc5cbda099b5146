"""Numbers that a kernel takes as they are, or as pointers; see `operators.register`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scalar(x, POINTER: tl.constexpr):
    """The number x, or the one that it points to."""
    if POINTER:
        x = tl.load(x)
    return x
