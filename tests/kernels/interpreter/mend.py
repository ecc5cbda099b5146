"""What Triton's interpreter gets wrong about matrix products and bfloat16, put right.

The stock one multiplies the bit patterns of bfloat16, truncates where the hardware rounds to
nearest even, and takes any input_precision for full float32. `test_mend.py` fails once it does not.
That of triton before 3.7 also takes the ends of a loop for arrays, which numpy refuses from 2.4 on.
And half of its time goes into finding what it has found before: whenever a function is called, the
builtins of the language, and for each operation, the table of types.

For tf32x3 the compiled code rounds to tf32 (cvt.rna.tf32.f32); for tf32 it hands the float32 to the
matrix instruction as it is, which is taken to ignore the last 13 bits.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

Array = NDArray[Any]


def mend(patch: pytest.MonkeyPatch) -> None:
    builder = interpreter.InterpreterBuilder
    stock_cast, stock_patch = builder.cast_impl, interpreter._patch_lang_tensor
    stock_dtype, dtypes = interpreter._get_np_dtype, {}

    def cast(self: Any, src: Any, to: Any) -> Any:
        if (src.dtype.scalar, to.scalar) == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(to_bfloat16(src.data), tl.bfloat16)
        return stock_cast(self, src, to)

    def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, _: Any) -> Any:
        left, right = (
            from_bfloat16(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b)
        )
        out = product(left, right, precision.name if left.dtype == np.float32 else "IEEE")
        return interpreter.TensorHandle(out.astype(d.data.dtype) + d.data, d.dtype.scalar)

    def patch_tensor(tensor: Any, *scope: Any) -> None:  # before each launch; undone after it
        stock_patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    def patch_builtin(package: Any, builder: Any, *scope: Any) -> None:
        for name in builtins(package):
            if not tl.core.is_builtin(member := getattr(package, name)):
                return  # the caller has patched them all
            interpreter._patch_attr(package, name, member, builder, *scope)

    def dtype(of: Any) -> Any:
        if (name := of.scalar.name) not in dtypes:
            dtypes[name] = stock_dtype(of.scalar)
        return dtypes[name]

    patch.setattr(interpreter, "_get_np_dtype", dtype)
    patch.setattr(interpreter, "_patch_builtin", patch_builtin)
    patch.setattr(interpreter, "_patch_lang_tensor", patch_tensor)
    patch.setattr(builder, "cast_impl", cast)
    patch.setattr(builder, "create_dot", dot)


@functools.cache
def builtins(package: Any) -> list[str]:
    """The names of those of a module or class, which nobody may have patched when first asked."""
    members = inspect.getmembers(package)
    return [name for name, member in members if tl.core.is_builtin(member)]


def product(a: Array, b: Array, precision: str) -> Array:
    if precision == "IEEE":
        return rounded_product(a, b)
    if precision == "TF32":
        return rounded_product(truncated(a), truncated(b))
    assert precision == "TF32x3"
    a_big, b_big = to_tf32(a), to_tf32(b)
    big = rounded_product(a_big, b_big)
    small = rounded_product(to_tf32(a - a_big), b_big) + rounded_product(a_big, to_tf32(b - b_big))
    return np.where(np.isnan(small), 0, small) + big  # as the compiled kernel does for infinities


def rounded_product(a: Array, b: Array) -> Array:
    """Equal columns give equal bits, as on the hardware; a product of BLAS in float32 may not."""
    return np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(np.float32)


def to_tf32(x: Array) -> Array:
    """Round float32 to 10 bits of mantissa, ties away from zero (cvt.rna.tf32.f32)."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return np.where(np.isfinite(x), truncated((bits + np.uint32(1 << 12)).view(np.float32)), x)


def truncated(x: Array) -> Array:
    """The first 10 bits of mantissa of float32."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return np.where(np.isnan(x), x, (bits & np.uint32(0xFFFFE000)).view(np.float32))


def to_bfloat16(x: Array) -> Array:
    return torch.from_numpy(np.array(x)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def from_bfloat16(bits: Array) -> Array:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)
