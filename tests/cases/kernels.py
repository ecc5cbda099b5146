"""`mmvq_kernels`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from cases.form import Case, anything, codes, z

import mmvq_kernels as kernels


def ema(**changes: Any) -> Callable[[], object]:
    arguments = {
        "codes": codes.clone(),
        "sums": codes.clone(),
        "counts": torch.ones(8),
        "batch_sums": codes,
        "batch_counts": torch.ones(8),
        "decay": 0.9,
    }
    return lambda: kernels.ema_update_(**{**arguments, **changes})


def triton() -> object:
    with patch("importlib.util.find_spec", lambda name: None):
        return kernels.nearest_code(codes, codes, backend="triton")


def traced() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit warns of itself
        return torch.jit.trace(lambda x: kernels.nearest_code(x, codes), codes)


KERNELS = [
    Case(
        traced,
        RuntimeError,
        "nearest_code: torch.jit.trace, and torch.onnx.export(dynamo=False), cannot record the "
        "search",
        "tracing: True",
        "use torch.export.export; for ONNX mmvq.onnx.export(quantizer, path), or "
        "torch.onnx.export(..., dynamo=True) with custom_translation_table="
        "mmvq.onnx.translation_table()",
    ),
    Case(
        lambda: kernels.code_log_probabilities(z, codes[:, :3]),
        ValueError,
        "code_log_probabilities: x [B, T, D] and codebook [L, D] must share their last dimension",
        "x: float32[2, 5, 4]   codebook: float32[8, 3]",
        "give every clip a time axis and project it to the codebook's width",
    ),
    Case(
        lambda: kernels.code_log_probabilities(z, codes[:0]),
        ValueError,
        "code_log_probabilities: codebook must not be empty",
        "codebook: float32[0, 4]",
        "build the codebook with size >= 1 and dim >= 1",
    ),
    *(
        Case(
            lambda mask=mask: kernels.code_log_probabilities(z, codes, mask),
            ValueError,
            "code_log_probabilities: mask must be bool [B, T]",
            f"x: float32[2, 5, 4]   mask: {came}",
            "give every segment one entry, True where it is valid",
        )
        for mask, came in (
            (torch.ones(2, 4, dtype=torch.bool), "bool[2, 4]"),
            (torch.ones(2, 5), "float32[2, 5]"),
        )
    ),
    Case(
        lambda: kernels.nearest_code(codes.long(), codes),
        TypeError,
        "nearest_code: x and codebook must be floating point",
        "x: int64[8, 4]   codebook: float32[8, 4]",
        "convert with .float()",
    ),
    Case(
        lambda: kernels.nearest_code(torch.zeros(800, 256), torch.zeros(400, 128)),
        ValueError,
        "nearest_code: x [N, D] and codebook [L, D] must share their last dimension",
        "x: float32[800, 256]   codebook: float32[400, 128]",
        "flatten x to two dimensions and project it to the codebook's width",
    ),
    Case(
        lambda: kernels.nearest_code(codes, codes[:0]),
        ValueError,
        "nearest_code: codebook must not be empty",
        "codebook: float32[0, 4]",
        "build the codebook with size >= 1 and dim >= 1",
    ),
    Case(
        lambda: kernels.nearest_code(codes, codes, precision=anything or "half"),
        ValueError,
        'nearest_code: precision must be "exact" or "fast"',
        "precision: 'half'",
        'leave it at "exact" unless a wrong code now and then is fine',
    ),
    *(
        Case(
            lambda values=values, indices=indices: kernels.code_statistics(values, indices, 8),
            TypeError,
            "code_statistics: values must be floating point and indices int64",
            came,
            "pass the indices that nearest_code returned",
        )
        for values, indices, came in (
            (codes, torch.ones(8), "values: float32[8, 4]   indices: float32[8]"),
            (codes.int(), torch.arange(8), "values: int32[8, 4]   indices: int64[8]"),
        )
    ),
    Case(
        lambda: kernels.code_statistics(codes, torch.arange(7), 8),
        ValueError,
        "code_statistics: values [N, D] and indices [N] must have the same N",
        "values: float32[8, 4]   indices: int64[7]",
        "flatten batch and time of both in the same order",
    ),
    *(
        Case(
            lambda groups=groups: kernels.code_statistics(
                codes, torch.arange(8), 8, groups=groups, num_groups=2
            ),
            ValueError,
            "code_statistics: groups must be int64 with one entry for each index",
            f"groups: {came}   indices: int64[8]",
            "give every row the number of its group",
        )
        for groups, came in (
            (torch.zeros(8), "float32[8]"),
            (torch.zeros(7, dtype=torch.long), "int64[7]"),
        )
    ),
    *(
        Case(
            lambda given=given: kernels.code_statistics(codes, torch.arange(8), **given),
            IndexError,
            f"code_statistics: {name} must be below {size}",
            f"largest: {largest}",
            hint,
        )
        for name, size, largest, hint, given in (
            ("indices", 7, 7, "pass num_codes=L of the codebook", {"num_codes": 7}),
            (
                "groups",
                2,
                3,
                "pass num_groups=G",
                {"num_codes": 8, "groups": torch.full((8,), 3), "num_groups": 2},
            ),
        )
    ),
    Case(
        ema(counts=torch.ones(7)),
        ValueError,
        "ema_update_: codes, sums and batch_sums must be [L, D], counts and batch_counts [L]",
        "codes: float32[8, 4]   sums: float32[8, 4]   batch_sums: float32[8, 4]   "
        "counts: float32[7]   batch_counts: float32[8]",
        "take the batch's from code_statistics(values, indices, num_codes=L)",
    ),
    Case(
        ema(dead=torch.ones(8, dtype=torch.bool)),
        ValueError,
        "ema_update_: dead [L] and replacement [L, D] must be given together",
        "codes: float32[8, 4]   dead: bool[8]   replacement: None",
        "give both to reset codes, neither to keep all",
    ),
    *(
        Case(
            call,
            ValueError,
            f"{where}: backend must be one of 'auto', 'torch', 'triton'",
            "backend: 'cuda'",
            'use backend="auto" to let the library choose',
        )
        for where, call in (
            ("reason_unavailable", lambda: kernels.reason_unavailable("cuda")),
            (
                "nearest_code",
                lambda: kernels.nearest_code(codes, codes, backend=anything or "cuda"),
            ),
            ("ema_update_", ema(backend="cuda")),
        )
    ),
    Case(
        triton,
        RuntimeError,
        "nearest_code: the triton backend cannot run because triton is not installed "
        "(pip install 'mmvq[triton]')",
        "backend: 'triton'",
        'use backend="auto"',
    ),
]
