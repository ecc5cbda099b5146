"""Codes in ONNX: `encode` and `decode` of a quantizer, or the search inside a model of your own.

Needs the extra `mmvq[onnx]`; torch.onnx imports it when it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmvq.checks import check_choice, check_instance, message
from mmvq.quantizer import MultiModalEMAQuantizer

__all__ = ["export", "translation_table"]


def export(
    quantizer: MultiModalEMAQuantizer,
    path: str | Path,
    method: Literal["encode", "decode"] = "encode",
) -> None:
    """Write one method of a quantizer as an ONNX model, with the codes as they are now.

    `"encode"` has the input `x`, float32 `[N, D]` (float64 if the codes are), and the output
    `indices`, int64 `[N]`; `"decode"` the reverse, with zeros for -1. Any N. Where two codes are
    nearest, the model takes the lowest index, as the quantizer does; where they differ by the
    rounding of a product in float32 it may take the other.

    Args:
        quantizer: any mode; nothing in it is changed.
        path: the file to write. Codes of more than half a gigabyte go into a second one beside it,
            `path` with `.data`.
        method: `"encode"` or `"decode"`.

    Raises:
        TypeError: what is not a quantizer.
        ValueError: an unknown method.
        ImportError: onnx or onnxscript is missing.
    """
    check_instance("mmvq.onnx.export", MultiModalEMAQuantizer, quantizer=quantizer)
    check_choice("mmvq.onnx.export", ("encode", "decode"), method=method)
    codes = quantizer.codebook
    names, example = ["x", "indices"], codes[:1].repeat(2, 1)
    if method == "decode":
        names, example = ["indices", "codes"], torch.zeros(2, dtype=torch.long, device=codes.device)
    torch.onnx.export(
        _Method(quantizer, method),
        (example,),
        path,
        input_names=names[:1],
        output_names=names[1:],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        custom_translation_table=translation_table(),
        dynamo=True,
        external_data=codes.nbytes > 1 << 29,  # ONNX ends at 2 GB a file
        verbose=False,
    )


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `torch.onnx.export(model, ..., dynamo=True, custom_translation_table=...)`.

    Lets a model that calls `encode`, or a quantizer itself in eval mode, become ONNX. The search is
    that of `mmvq_kernels.nearest_code` in plain operators, with all `[N, L]` scores at a time.

    Raises:
        ImportError: onnx or onnxscript is missing.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        rule = "ONNX needs onnx and onnxscript"
        hint = "pip install 'mmvq[onnx]'"
        raise ImportError(message("mmvq.onnx", rule, hint=hint, missing=missing))
    return {torch.ops.mmvq.nearest_code.default: _nearest_code}


class _Method(nn.Module):
    def __init__(self, quantizer: MultiModalEMAQuantizer, method: str) -> None:
        super().__init__()
        self.quantizer, self.method = quantizer, method
        self.training = False  # of this module alone: neither method asks for the mode

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = getattr(self.quantizer, self.method)(x)
        return out


def _nearest_code(x: Any, codebook: Any, fast: bool = False) -> Any:
    """`h - x . e'` over centred codes, its lowest argument; see `mmvq_kernels.nearest`."""
    import onnx_ir as ir
    from onnxscript import opset18

    op: Any = opset18
    wide = ir.DataType.DOUBLE in (x.dtype, codebook.dtype)
    dtype = ir.DataType.DOUBLE if wide else ir.DataType.FLOAT
    x, codes = op.Cast(x, to=dtype), op.Cast(codebook, to=dtype)
    last, zero = op.Constant(value_ints=[-1]), op.Constant(value_int=0)

    def number(value: float) -> Any:
        return op.CastLike(op.Constant(value_float=value), codes)

    def holds(cells: Any) -> Any:
        """Whether a row of bools holds True."""
        ones = op.ReduceMax(op.Cast(cells, to=ir.DataType.INT32), last, keepdims=0)
        return op.Cast(ones, to=ir.DataType.BOOL)

    # A code that is not finite becomes a copy of the first finite one, which a lower index hides.
    finite = op.Not(holds(op.Or(op.IsNaN(codes), op.IsInf(codes))))  # [L]
    first = op.ArgMax(op.Cast(finite, to=ir.DataType.INT32), axis=0, keepdims=0)
    size = op.Squeeze(op.Shape(finite))
    own = op.Where(finite, op.Range(zero, size, op.Constant(value_int=1)), first)
    codes = op.Gather(codes, own)
    mean = op.ReduceMean(codes, op.Constant(value_ints=[0]), keepdims=1)
    spread = op.ReduceMax(op.Abs(op.Sub(codes, mean)), keepdims=0)
    exponent = op.Floor(op.Div(op.Log(spread), number(math.log(2))))
    step = op.Pow(number(2.0), op.Sub(exponent, number(3.0)))
    rounded = op.Mul(op.Round(op.Div(mean, step)), step)
    mean = op.Where(op.Greater(spread, number(0.0)), rounded, mean)
    centred = op.Sub(codes, mean)
    norms = op.ReduceSum(op.Mul(op.Add(codes, mean), centred), last, keepdims=0)  # [L]
    product = op.MatMul(x, op.Transpose(centred, perm=[1, 0]))
    scores = op.Sub(op.Div(norms, number(2.0)), product)  # [N, L]
    best = op.ReduceMin(scores, last, keepdims=0)
    fit = op.Not(op.Or(holds(op.IsNaN(scores)), op.IsInf(best)))
    chosen = op.ArgMin(scores, axis=1, keepdims=0)
    _, rows, copies, _ = op.Unique(codes, axis=0)  # the scores of equal codes may differ in a bit
    lowest = op.Gather(op.Gather(rows, copies), chosen)
    return op.Where(fit, op.Gather(own, lowest), zero)
