"""Initial codes from data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmvq.functional.statistics import finite_rows
from mmvq_kernels import nearest, statistics
from mmvq_kernels.hashing import mix
from mmvq_kernels.operators import register


def sample_rows(x: Tensor, num_codes: int, usable: Tensor | None = None) -> Tensor:
    """Sample `num_codes` rows of `x` `[N, D]` without a generator: same rows, same sample.

    If there are fewer rows than codes, rows repeat with a jitter of 1% of the data's range. Rows
    that are False in `usable` `[N]` are ignored. If none is left, the result is undefined.

    Examples:
        >>> x = torch.arange(10.0)[:, None]
        >>> torch.isin(sample_rows(x, 3), x).all()
        tensor(True)
    """
    usable = torch.ones_like(x[:, 0], dtype=torch.bool) if usable is None else usable
    return _shuffled(x, usable, torch.arange(num_codes, device=x.device))


def _shuffled(x: Tensor, usable: Tensor, picks: Tensor) -> Tensor:
    """Rows at positions `picks` of the shuffled usable rows, repeated with jitter past the end."""
    count = usable.sum()
    place = torch.where(usable, usable.cumsum(0) - 1, len(x))  # among the usable; others last
    order = torch.where(usable, mix(place) >> 1, torch.iinfo(torch.long).max).argsort(stable=True)
    rows = x[order[picks % count.clamp(min=1)]]
    cells = torch.arange(rows.numel(), device=x.device).view_as(rows)
    jitter = 0.01 * _range(x, usable) * (mix(cells) >> 40).to(x.dtype) / 2**23
    return torch.where((picks < count)[:, None], rows, rows + jitter)


def kmeans(
    x: Tensor, num_codes: int, usable: Tensor | None = None, *, iterations: int = 10
) -> Tensor:
    """k-means++ and Lloyd's algorithm: centres `[num_codes, D]` of the rows of `x` `[N, D]`.

    Deterministic: the same rows give the same centres. The initial centres are distinct rows. If
    there are too few, rows repeat with jitter as in `sample_rows`. A centre that loses all its rows
    does not move. Rows that are not finite, or False in `usable` `[N]`, are ignored. If none is
    left, the result is undefined.

    Source: Arthur and Vassilvitskii, k-means++: the advantages of careful seeding, 2007.

    Examples:
        >>> x = torch.tensor([0.0, 1.0, 10.0, 11.0])[:, None]
        >>> kmeans(x, 2).flatten().sort().values
        tensor([ 0.5000, 10.5000])
    """
    usable = finite_rows(x) if usable is None else usable & finite_rows(x)
    x = x.detach()
    chosen = _spread_rows(x, usable, num_codes)
    spare = _shuffled(x, usable, usable.sum() + torch.arange(num_codes, device=x.device))
    centres = torch.where(chosen[:, None] >= 0, x[chosen], spare)
    for _ in range(iterations):
        indices = torch.where(usable, nearest.search(x, centres, False), -1)
        flat = statistics.accumulate(x, indices, num_codes, None, 1, True)
        counts, sums = statistics.split(flat, 1, num_codes, x.shape[1])
        counts = counts[0, :, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres


def _spread_rows_torch(x: Tensor, usable: Tensor, num_codes: int) -> Tensor:
    """k-means++: indices of distinct rows, int64 `[num_codes]`; -1 once none is left.

    Each step samples candidates in proportion to the squared distance from the rows chosen so far,
    and takes the candidate that leaves the smallest sum of squared distances. The weights are
    integers, so that sums are exact. Unusable rows have weight 0, and no effect.
    """
    N, device = len(x), x.device
    x = torch.where(usable[:, None], x, 0).double()
    x = x - x[usable.int().argmax(0, keepdim=True)]  # centred at the first usable row
    squares = x.square().sum(1)
    candidates = 2 + int(math.log(num_codes))  # as in scikit-learn
    largest_weight = 2.0 ** (52 - N.bit_length())
    limits = torch.finfo(x.dtype)
    distance = x.new_full((N,), limits.max).masked_fill_(~usable, 0)  # squared, to the chosen rows

    chosen = []
    for start in range(0, candidates * num_codes, candidates):
        scale = largest_weight / distance.amax().clamp(min=limits.tiny)
        ends = (distance * scale).round().long().cumsum(0)
        keys = mix(torch.arange(start, start + candidates, device=device))
        places = (keys >> 11).bitwise_and_(2**53 - 1).double() / 2**53  # in [0, 1)
        places = (places * ends[-1]).floor().long()
        rows = torch.searchsorted(ends, places, right=True).clamp(max=N - 1)
        both = squares + squares[rows, None]  # [candidates, N]
        left = torch.addmm(both, x[rows], x.T, alpha=-2, beta=1 - 1e-13)  # 0 for equal rows
        left = left.clamp_(min=0).minimum(distance)
        best = (left * scale).round_().sum(1).argmin(0, keepdim=True)
        distance = left[best][0]
        chosen.append(torch.where(ends[-1] > 0, rows[best], -1))
    return torch.cat(chosen)


_spread_rows = register(
    "mmvq::spread_rows",
    _spread_rows_torch,
    fake=lambda x, _usable, num_codes: x.new_empty(num_codes, dtype=torch.long),
)


def _range(x: Tensor, usable: Tensor) -> Tensor:
    """Range of the usable rows, `[D]`: largest minus smallest, which no order of rows changes."""
    highest = torch.where(usable[:, None], x, -torch.inf).amax(0)
    return highest - torch.where(usable[:, None], x, torch.inf).amin(0)
