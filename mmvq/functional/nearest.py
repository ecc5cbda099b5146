"""Nearest code (Eq. 2)."""

from __future__ import annotations

from torch import Tensor

import mmvq_kernels
from mmvq_kernels.nearest import nearest_code_ref

__all__ = ["nearest_code", "nearest_code_ref"]


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    r"""Index of the nearest code, $l = \mathrm{argmin}_j \lVert x - e_j \rVert_2$ (Eq. 2).

    Args:
        x: vectors `[..., D]`, any float dtype.
        codebook: codes `[L, D]`.

    Returns:
        Indices, int64 `[...]`: the lowest on ties, 0 if the vector is not finite. No gradient.

    Raises:
        ValueError: the last dimensions differ, or the codebook is empty.
        TypeError: x or codebook is not floating point.

    Source: Eq. 2; computed by `mmvq_kernels.nearest_code`.

    Examples:
        >>> codebook = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        >>> functional.nearest_code(torch.tensor([[[0.9, 0.8], [0.1, 0.2]]]), codebook)
        tensor([[1, 0]])
    """
    rows = x.reshape(-1, x.shape[-1])
    return mmvq_kernels.nearest_code(rows, codebook).view(x.shape[:-1])
