"""The alternatives to mmvq (peers). Those that are not installed are left out."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import mmvq_kernels
from mmvq_kernels import narrow

Search = Callable[[Tensor, Tensor], object]
_THRESHOLD = "distance_compute_blas_threshold"  # N D below which faiss makes no matrix product
_FULL_BYTES = 1 << 30  # maximum bytes of the [N, L] distances of cdist
_BLOCK = {  # rows and codes in a block of the product: 2 MiB of scores, on a GPU 512
    "cpu": (512, 1024),
    "cuda": (16384, 8192),
}


def find(module: str) -> Any | None:
    """The module, or None if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def missing() -> list[str]:
    """Names of the packages that are not installed."""
    return [m for m in ("faiss", "sklearn", "vector_quantize_pytorch") if find(m) is None]


def use_threads(number: int) -> None:
    """Give torch and every peer the same number of threads."""
    torch.set_num_threads(number)
    if faiss := find("faiss"):
        faiss.omp_set_num_threads(number)
    if pools := find("threadpoolctl"):
        pools.threadpool_limits(number)


def product(x: Tensor, codebook: Tensor) -> None:
    """The lower bound: `torch.mm` of all vectors and all codes, block by block in one buffer."""
    rows, width = _BLOCK[x.device.type]
    rows, width = rows * width // min(width, len(codebook)), min(width, len(codebook))
    scores = x.new_empty(min(rows, x.shape[0]), width)
    for codes in codebook.split(width):
        for block in x.split(rows):
            torch.mm(block, codes.T, out=scores[: len(block), : len(codes)])


def _by_addmm(x: Tensor, codebook: Tensor) -> Tensor:
    """A fast search in plain torch: the maximum of `x . e - |e|^2 / 2`, in blocks of rows."""
    half = codebook.square().sum(1) * -0.5
    return torch.cat([torch.addmm(half, rows, codebook.T).max(1)[1] for rows in x.split(1 << 14)])


def _in(dtype: torch.dtype, precision: str) -> Search:
    """`_by_addmm` in a dtype, with products of float32 at a precision of torch's."""

    def by_addmm(x: Tensor, codebook: Tensor) -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return _by_addmm(x.to(dtype), codebook.to(dtype))
        finally:
            torch.set_float32_matmul_precision(before)

    return by_addmm


def approximate_searches(x: Tensor, codebook: Tensor) -> dict[str, Search]:
    """The alternatives on a GPU that may choose a farther code, by name."""
    found = {
        "addmm and max, tf32": _in(torch.float32, "high"),
        "addmm and max, bf16": _in(torch.bfloat16, "highest"),
    }
    if x.device.type == "cuda" and (flash := find("flash_kmeans.assign_euclid_triton")):
        codes, norms = codebook.to(x.dtype)[None], x.float().square().sum(1)[None]
        found["flash-kmeans"] = lambda x, _: flash.euclid_assign_triton(x[None], codes, norms)[0]
    return found


def quantizer(dim: int, codes: int) -> Any:
    """The quantizer of vector-quantize-pytorch with the settings nearest to ours."""
    package = find("vector_quantize_pytorch")
    assert package is not None
    return package.VectorQuantize(
        dim=dim,
        codebook_size=codes,
        decay=0.99,
        commitment_weight=0.25,
        threshold_ema_dead_code=2,
    )


def _by_faiss(faiss: Any, threshold: int | None, x: Tensor, codebook: Tensor) -> Tensor:
    """faiss, whose way with few vectors is slow from 1.13 on unless its `threshold` is 0."""
    before = getattr(faiss.cvar, _THRESHOLD)
    setattr(faiss.cvar, _THRESHOLD, before if threshold is None else threshold)
    try:
        index = faiss.IndexFlatL2(codebook.shape[1])
        index.add(codebook.numpy())
        return torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])
    finally:
        setattr(faiss.cvar, _THRESHOLD, before)


def _without_numba(x: Tensor, codebook: Tensor) -> Tensor:
    with patch.object(narrow, "takes", lambda *_: False):
        return mmvq_kernels.nearest_code(x, codebook)


def searches(x: Tensor, codebook: Tensor) -> dict[str, Search]:
    """The alternatives that can search these tensors, by name."""
    found: dict[str, Search] = {}
    on_cpu = x.device.type == "cpu"
    if on_cpu and x.dtype == torch.float32 and (faiss := find("faiss")):
        found["faiss"] = functools.partial(_by_faiss, faiss, None)
        few = x.numel() < getattr(faiss.cvar, _THRESHOLD, 0) and len(x) >= 20  # as older ones do
        if few:
            found["faiss, threshold 0"] = functools.partial(_by_faiss, faiss, 0)
    if on_cpu and narrow.takes(x, codebook):
        found["mmvq without numba"] = _without_numba
    if on_cpu and (sklearn := find("sklearn.metrics")):
        found["scikit-learn"] = lambda x, codebook: torch.from_numpy(
            sklearn.pairwise_distances_argmin(x.numpy(), codebook.numpy())
        )
    if not on_cpu:
        found["addmm and max"] = _in(torch.promote_types(x.dtype, torch.float32), "highest")
    if x.shape[0] * codebook.shape[0] * x.element_size() <= _FULL_BYTES:
        found["cdist"] = lambda x, codebook: torch.cdist(x.to(codebook.dtype), codebook).argmin(1)
    return found
