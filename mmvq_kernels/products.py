"""Matrix products: on a CPU by oneDNN, up to twice as fast as the BLAS behind `torch.mm`."""

from __future__ import annotations

import torch
from torch import Tensor

ONEDNN = torch.backends.mkldnn.is_available()


def by_onednn(a: Tensor) -> bool:
    """Whether `matmul_t` takes oneDNN."""
    traced = torch.compiler.is_compiling()  # inductor supports it for a constant `b` only
    return ONEDNN and not traced and a.device.type == "cpu" and a.dtype == torch.float32


def matmul_t(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a @ b.T + bias` of `[..., K]` and `[N, K]`; a is `[M, K]` where there is a bias.

    To be called without autocast and without gradients.
    """
    if by_onednn(a):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
        return product
    return a @ b.T if bias is None else torch.addmm(bias, a, b.T)
