"""First codes from data."""

from __future__ import annotations

import torch
from torch import Tensor

from mmvq.functional.nearest import nearest_code
from mmvq.functional.statistics import code_statistics
from mmvq_kernels.hashing import mix


def sample_rows(x: Tensor, num_codes: int, usable: Tensor | None = None) -> Tensor:
    """`num_codes` rows of `x` `[N, D]`, drawn without a generator: same rows, same draw.

    With fewer rows than codes, rows repeat with a jitter of 1% of the data's range. Rows that are
    False in `usable` `[N]` are as if they were not there; with none left, the result means nothing.

    Examples:
        >>> x = torch.arange(10.0)[:, None]
        >>> torch.isin(sample_rows(x, 3), x).all()
        tensor(True)
    """
    usable = torch.ones_like(x[:, 0], dtype=torch.bool) if usable is None else usable
    count = usable.sum()
    place = torch.where(usable, usable.cumsum(0) - 1, len(x))  # among the usable; the others last
    order = torch.where(usable, mix(place) >> 1, torch.iinfo(torch.long).max).argsort(stable=True)
    picks = torch.arange(num_codes, device=x.device)
    rows = x[order[picks % count.clamp(min=1)]]
    cells = torch.arange(rows.numel(), device=x.device).view_as(rows)
    jitter = 0.01 * _range(x, usable) * (mix(cells) >> 40).to(x.dtype) / 2**23
    return torch.where((picks < count)[:, None], rows, rows + jitter)


def kmeans(
    x: Tensor, num_codes: int, usable: Tensor | None = None, *, iterations: int = 10
) -> Tensor:
    """Lloyd's algorithm from `sample_rows`: centres `[num_codes, D]` of the rows of `x` `[N, D]`.

    A centre that loses all its rows stays where it is. `usable` as in `sample_rows`.

    Examples:
        >>> x = torch.tensor([0.0, 1.0, 10.0, 11.0])[:, None]
        >>> kmeans(x, 2).flatten().sort().values
        tensor([ 0.5000, 10.5000])
    """
    usable = torch.ones_like(x[:, 0], dtype=torch.bool) if usable is None else usable
    centres = sample_rows(x, num_codes, usable)
    for _ in range(iterations):
        nearest = torch.where(usable, nearest_code(x, centres), -1)
        counts, sums = code_statistics(x, nearest, num_codes)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres)
    return centres


def _range(x: Tensor, usable: Tensor) -> Tensor:
    """Largest minus smallest of the usable rows, `[D]`: the same bits in any order of the rows."""
    highest = torch.where(usable[:, None], x, -torch.inf).amax(0)
    return highest - torch.where(usable[:, None], x, torch.inf).amin(0)
