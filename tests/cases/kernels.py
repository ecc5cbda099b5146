"""`mmvq_kernels`."""

from __future__ import annotations

import warnings
from typing import Any
from unittest.mock import patch

import torch
from cases.form import Call, anything, codes, of_each, refused, whole, z

import mmvq_kernels as kernels


def ema(**changes: Any) -> Call:
    arguments = {
        "codes": codes.clone(),
        "sums": codes.clone(),
        "counts": torch.ones(8),
        "batch_sums": codes,
        "batch_counts": torch.ones(8),
        "decay": 0.9,
    }
    return lambda: kernels.ema_update_(**{**arguments, **changes})


def statistics(values: Any = codes, indices: Any = None, num_codes: int = 8, **rest: Any) -> Call:
    indices = torch.arange(8) if indices is None else indices
    return lambda: kernels.code_statistics(values, indices, num_codes, **rest)


def triton() -> object:
    with patch("importlib.util.find_spec", lambda name: None):
        return kernels.nearest_code(codes, codes, backend="triton")


def traced() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit warns of itself
        return torch.jit.trace(lambda x: kernels.nearest_code(x, codes), codes)


KERNELS = [
    refused(
        TypeError,
        "code_log_probabilities: x and codebook must be floating point",
        lambda: kernels.code_log_probabilities(z.long(), codes),
        lambda: kernels.code_log_probabilities(z, codes.long()),
    ),
    refused(
        TypeError,
        "ema_update_: codes, sums and counts must be floating point, of one dtype, and dead bool",
        ema(sums=codes.double()),
        ema(dead=torch.ones(8), replacement=codes),
    ),
    refused(
        RuntimeError,
        "nearest_code: torch.jit.trace, and torch.onnx.export(dynamo=False), cannot record it",
        traced,
    ),
    refused(
        ValueError,
        "code_log_probabilities: x [B, T, D] and codebook [L, D] must share their last dimension",
        lambda: kernels.code_log_probabilities(z, codes[:, :3]),
    ),
    refused(
        ValueError,
        "code_log_probabilities: codebook must not be empty",
        lambda: kernels.code_log_probabilities(z, codes[:0]),
    ),
    refused(
        ValueError,
        "code_log_probabilities: mask must be bool [B, T]",
        *of_each(
            lambda mask: kernels.code_log_probabilities(z, codes, mask),
            *(whole[:, :4], whole.float()),
        ),
    ),
    refused(
        TypeError,
        "nearest_code: x and codebook must be floating point",
        lambda: kernels.nearest_code(codes.long(), codes),
    ),
    refused(
        ValueError,
        "nearest_code: x must be [N, D] and codebook [L, D], with the same D",
        lambda: kernels.nearest_code(torch.zeros(800, 256), torch.zeros(400, 128)),
    ),
    refused(
        ValueError,
        "nearest_code: codebook must not be empty",
        lambda: kernels.nearest_code(codes, codes[:0]),
    ),
    refused(
        ValueError,
        'nearest_code: precision must be "exact" or "fast"',
        lambda: kernels.nearest_code(codes, codes, precision=anything or "half"),
    ),
    refused(
        TypeError,
        "code_statistics: values must be floating point and indices int64",
        statistics(indices=torch.ones(8)),
        statistics(codes.int()),
    ),
    refused(
        ValueError,
        "code_statistics: values [N, D] and indices [N] must have the same N",
        statistics(indices=torch.arange(7)),
    ),
    refused(
        ValueError,
        "code_statistics: groups must be int64 with one entry for each index",
        statistics(groups=torch.zeros(8), num_groups=2),
        statistics(groups=torch.zeros(7, dtype=torch.long), num_groups=2),
    ),
    refused(IndexError, "code_statistics: indices must be below 7", statistics(num_codes=7)),
    refused(
        IndexError,
        "code_statistics: groups must be below 2",
        statistics(groups=torch.full((8,), 3), num_groups=2),
    ),
    refused(
        ValueError,
        "ema_update_: codes, sums and batch_sums must be [L, D], counts and batch_counts [L]",
        ema(counts=torch.ones(7)),
    ),
    refused(
        ValueError,
        "ema_update_: dead [L] and replacement [L, D] must be given together",
        ema(dead=torch.ones(8, dtype=torch.bool)),
    ),
    *(
        refused(ValueError, f"{where}: backend must be one of 'auto', 'torch', 'triton'", call)
        for where, call in (
            ("reason_unavailable", lambda: kernels.reason_unavailable("cuda")),
            (
                "nearest_code",
                lambda: kernels.nearest_code(codes, codes, backend=anything or "cuda"),
            ),
            ("ema_update_", ema(backend="cuda")),
        )
    ),
    refused(
        RuntimeError,
        "nearest_code: the triton backend cannot run because triton is not installed "
        "(pip install 'mmvq[triton]')",
        triton,
    ),
]
