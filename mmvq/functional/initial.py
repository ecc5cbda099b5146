"""First codes from data."""

from __future__ import annotations

import torch
from torch import Tensor

from mmvq.functional.nearest import nearest_code
from mmvq.functional.statistics import code_statistics
from mmvq_kernels.hashing import mix


def sample_rows(x: Tensor, num_codes: int) -> Tensor:
    """`num_codes` rows of `x` `[N, D]`, drawn without a generator: same rows, same draw.

    With fewer rows than codes, rows repeat with a jitter of 1% of the data's spread.
    """
    order = mix(torch.arange(x.shape[0], device=x.device)).argsort(stable=True)
    picks = torch.arange(num_codes, device=x.device)
    rows = x[order[picks % x.shape[0]]]
    cells = torch.arange(rows.numel(), device=x.device).view_as(rows)
    jitter = 0.01 * x.std(0, correction=0) * (mix(cells) >> 40).to(x.dtype) / 2**23
    return torch.where((picks < x.shape[0])[:, None], rows, rows + jitter)


def kmeans(x: Tensor, num_codes: int, iterations: int = 10) -> Tensor:
    """Lloyd's algorithm from `sample_rows`: centres `[num_codes, D]` of the rows of `x` `[N, D]`.

    A centre that loses all its rows stays where it is.
    """
    centres = sample_rows(x, num_codes)
    for _ in range(iterations):
        counts, sums = code_statistics(x, nearest_code(x, centres), num_codes)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres)
    return centres
