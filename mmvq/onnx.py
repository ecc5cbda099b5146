"""ONNX models of a quantizer's `encode` and `decode`, or of a model that searches a codebook.

`torch.onnx` writes the models; the extra `mmvq[onnx]` installs what it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from warnings import warn

import torch
from torch import Tensor, nn

from mmvq.checks import check_choice, check_instance
from mmvq.optional import optional_import
from mmvq.quantizer import MultiModalEMAQuantizer

__all__ = ["decompositions", "export", "translation_table"]


def export(
    quantizer: MultiModalEMAQuantizer,
    path: str | Path,
    method: Literal["encode", "decode"] = "encode",
) -> None:
    """Write one method of a quantizer as an ONNX model, with the present codes.

    `"encode"` has the input `x`, float32 `[N, D]` (float64 if the codes are), and the output
    `indices`, int64 `[N]`. `"decode"` has the input `indices` and the output `codes`, with zeros
    for the index -1. N is dynamic. Ties go to the lowest index, as in the quantizer. Of two codes
    whose distances differ by floating-point error alone, the model may choose the other one.

    Args:
        quantizer: quantizer in any mode; it is not changed.
        path: file to write. Codes of more than half a gigabyte are written to a second file, `path`
            with the suffix `.data`.
        method: method to export, `"encode"` or `"decode"`.

    Raises:
        TypeError: `quantizer` is not a `MultiModalEMAQuantizer`.
        ValueError: `method` is unknown.
        ImportError: onnx or onnxscript is not installed.
    """
    where, hint = "mmvq.onnx.export", "pip install 'mmvq[onnx]'"
    check_instance(where, MultiModalEMAQuantizer, quantizer=quantizer)
    check_choice(where, ("encode", "decode"), method=method)
    with optional_import(where, "ONNX needs onnx and onnxscript", hint):
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    codes = quantizer.codebook
    names, example = ["x", "indices"], codes[:1].repeat(2, 1)
    if method == "decode":
        names, example = ["indices", "codes"], torch.zeros(2, dtype=torch.long, device=codes.device)
    program = torch.export.export(
        _Method(quantizer, method),
        (example,),
        dynamic_shapes=({0: torch.export.Dim("N")},),
        strict=False,
    )
    torch.onnx.export(
        program.run_decompositions(decompositions()),
        (),
        path,
        input_names=names[:1],
        output_names=names[1:],
        dynamo=True,
        external_data=codes.nbytes > 1 << 29,  # an ONNX file ends at 2 GB
        verbose=False,
    )


def decompositions() -> dict[Any, Callable[..., Tensor]]:
    """The search in torch operators that ONNX has, for `ExportedProgram.run_decompositions`.

    `torch.onnx.export` takes the decomposed program of a model that calls `encode`, or of a
    quantizer itself in eval mode. The program computes all `[N, L]` scores at a time.
    """
    return {torch.ops.mmvq.nearest_code.default: _nearest_code}


def translation_table() -> dict[Any, Callable[..., Any]]:
    """Deprecated, to be removed in the next release: use `decompositions`.

    Registers the decomposition with torch, so that `custom_translation_table` may be empty.
    """
    text = "mmvq.onnx.translation_table is deprecated: decompose the exported program by"
    text = f"{text} mmvq.onnx.decompositions; the next release drops translation_table"
    warn(text, DeprecationWarning, stacklevel=2)
    torch._decomp.decomposition_table.update(decompositions())
    return {}


class _Method(nn.Module):
    def __init__(self, quantizer: MultiModalEMAQuantizer, method: str) -> None:
        super().__init__()
        self.quantizer, self.method = quantizer, method
        self.training = False  # of this module alone: neither method depends on the mode

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = getattr(self.quantizer, self.method)(x)
        return out


def _nearest_code(x: Tensor, codebook: Tensor, fast: bool = False) -> Tensor:
    """`argmin_l (h_l - x . e'_l)` over centred codes, as in `mmvq_kernels.nearest_code`.

    The centre is itself a code, so that the codes of a lattice stay on it and exact ties exact.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    x, codes = x.to(dtype), codebook.to(dtype)
    finite = codes.isfinite().all(1)
    index = torch.arange(len(codes), device=codes.device)
    index = torch.where(finite, index, finite.int().argmax())  # of the first finite code otherwise
    codes = codes[index]
    centre = codes[(codes - codes.mean(0)).square().sum(1).argmin(0, keepdim=True)]
    centred = codes - centre
    half_norm = ((codes + centre) * centred).sum(1) / 2
    least, nearest = (half_norm - x @ centred.T).min(1)
    keys = _keys(codes)
    lowest = (keys[nearest, None] == keys).int().argmax(1)  # scores of equal codes may differ
    lowest = torch.where((codes[lowest] == codes[nearest]).all(1), lowest, nearest)
    return torch.where(x.isfinite().all(1) & least.isfinite(), index[lowest], 0)


def _keys(codes: Tensor) -> Tensor:
    """Int64 `[L]`, equal for equal codes `[L, D]`, and seldom for others.

    A projection of the codes in fixed point, as a sum of integers is exact in any order. Its
    factors, the sines of 1 to D, have no linear relation with integer coefficients.
    """
    factors = torch.arange(1, codes.shape[1] + 1, dtype=torch.float64, device=codes.device).sin()
    return (codes.double() / codes.abs().max() * factors * 2.0**50).long().sum(1)
