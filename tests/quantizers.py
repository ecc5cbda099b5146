"""A small quantizer of three modalities, its batches and its masks."""

from __future__ import annotations

from typing import Any

import torch
from support import bools, uniform
from torch import Tensor, nn

from mmvq import EMACodebook, MultiModalEMAQuantizer

B, T, D, L = 3, 5, 4, 8
NAMES = ("video", "audio", "text")
FLOATS = ("codes", "sums", "counts")
INTEGERS = ("ages", "usage", "steps", "initialized")
Tensors = dict[str, Tensor]


def batch(
    dtype: torch.dtype = torch.float32, seed: int = 0, names: tuple[str, ...] = NAMES
) -> Tensors:
    return {m: uniform(B, T, D, dtype=dtype, seed=seed + 7 * i) for i, m in enumerate(names)}


def some_masks() -> Tensors:
    return {m: bools(B, T, seed=i) for i, m in enumerate(NAMES)}


def trained(**options: Any) -> MultiModalEMAQuantizer:
    """A quantizer that has seen two batches."""
    quantizer = MultiModalEMAQuantizer(D, L, NAMES, **options)
    for seed in (100, 200):
        quantizer(batch(seed=seed))
    return quantizer


def book_of(module: nn.Module) -> EMACodebook:
    (book,) = (m for m in module.modules() if isinstance(m, EMACodebook))
    return book


def dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    return {name.rpartition(".")[2]: x.dtype for name, x in module.named_buffers()}


def kinds(wide: torch.dtype) -> dict[str, torch.dtype]:
    """What the buffers of a codebook are."""
    return dict.fromkeys(FLOATS, wide) | dict.fromkeys(INTEGERS, torch.int64)
