"""First codes from data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmvq.functional.nearest import nearest_code
from mmvq.functional.statistics import code_statistics, finite_rows
from mmvq_kernels.backends import one_after_another, transformed
from mmvq_kernels.hashing import mix

_STEPS = 1024  # of k-means++; with more codes, a step takes several


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
    return _shuffled(x, usable, torch.arange(num_codes, device=x.device))


def _shuffled(x: Tensor, usable: Tensor, picks: Tensor) -> Tensor:
    """Rows at places of the shuffled usable rows, which begin again, jittered, at their end."""
    count = usable.sum()
    place = torch.where(usable, usable.cumsum(0) - 1, len(x))  # among the usable; the others last
    order = torch.where(usable, mix(place) >> 1, torch.iinfo(torch.long).max).argsort(stable=True)
    rows = x[order[picks % count.clamp(min=1)]]
    cells = torch.arange(rows.numel(), device=x.device).view_as(rows)
    jitter = 0.01 * _range(x, usable) * (mix(cells) >> 40).to(x.dtype) / 2**23
    return torch.where((picks < count)[:, None], rows, rows + jitter)


def kmeans(
    x: Tensor, num_codes: int, usable: Tensor | None = None, *, iterations: int = 10
) -> Tensor:
    """k-means++ and Lloyd's algorithm: centres `[num_codes, D]` of the rows of `x` `[N, D]`.

    Without a generator: same rows, same centres. The first centres are distinct rows; where these
    are fewer than codes, jittered rows as of `sample_rows`. A centre that loses all its rows stays
    where it is. Rows that are not finite, or False in `usable` `[N]`, are as if they were not
    there; with none left, the result means nothing.

    Source: Arthur and Vassilvitskii, k-means++: the advantages of careful seeding, 2007.

    Examples:
        >>> x = torch.tensor([0.0, 1.0, 10.0, 11.0])[:, None]
        >>> kmeans(x, 2).flatten().sort().values
        tensor([ 0.5000, 10.5000])
    """
    usable = finite_rows(x) if usable is None else usable & finite_rows(x)
    in_a_graph = torch.compiler.is_compiling() or transformed()
    seed = _spread_rows if in_a_graph else _spread_rows_torch
    chosen = seed(x.detach(), usable, num_codes)
    spare = _shuffled(x, usable, usable.sum() + torch.arange(num_codes, device=x.device))
    centres = torch.where(chosen[:, None] >= 0, x[chosen], spare)
    for _ in range(iterations):
        nearest = torch.where(usable, nearest_code(x, centres), -1)
        counts, sums = code_statistics(x, nearest, num_codes)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres)
    return centres


@torch.library.custom_op("mmvq::spread_rows", mutates_args=())
def _spread_rows(x: Tensor, usable: Tensor, num_codes: int) -> Tensor:
    return _spread_rows_torch(x, usable, num_codes)


@_spread_rows.register_fake
def _(x: Tensor, usable: Tensor, num_codes: int) -> Tensor:
    return x.new_empty(num_codes, dtype=torch.long)


one_after_another(_spread_rows)


def _spread_rows_torch(x: Tensor, usable: Tensor, num_codes: int) -> Tensor:
    """k-means++: int64 `[num_codes]` distinct rows, -1 where there is none left.

    A step draws candidates in proportion to the squared distance from the rows chosen so far, and
    chooses those that leave the least sum of it. The weights are whole numbers, so that their sums
    are exact: rows of weight 0, which the unusable are, change nothing.
    """
    N, device, exact = len(x), x.device, "donot_use_mm_for_euclid_dist"
    x = torch.where(usable[:, None], x, 0).to(torch.promote_types(x.dtype, torch.float32))
    taken = -(-num_codes // _STEPS)  # rows a step
    drawn = max(2 + int(math.log(num_codes)), 2 * taken)  # the number that scikit-learn draws
    limits, largest_weight = torch.finfo(x.dtype), 2.0 ** (52 - N.bit_length())
    distance = x.new_full((N,), limits.max).masked_fill_(~usable, 0)  # squared, to what is chosen

    chosen = []
    for start in range(0, drawn * -(-num_codes // taken), drawn):
        largest = distance.amax().clamp(min=limits.tiny)
        ends = (distance / largest * largest_weight).round().cumsum(0, dtype=torch.float64)
        keys = mix(torch.arange(start, start + drawn, device=device))
        places = (keys >> 11).bitwise_and_(2**53 - 1).double() / 2**53  # in [0, 1)
        if taken > 1:  # at once: in different parts
            places = (places + torch.arange(drawn, device=device)) / drawn
        rows = torch.searchsorted(ends, (places * ends[-1]).floor(), right=True).clamp(max=N - 1)
        apart = torch.cdist(x[rows], x, compute_mode=exact).square()  # [drawn, N]
        left = torch.minimum(apart, distance)
        sums = (left / largest * largest_weight).round().sum(1, dtype=torch.float64)
        best = sums.argsort(stable=True)[:taken]
        distance = left[best].amin(0)
        copies = (apart[best][:, rows[best]] == 0).tril(-1).any(1)
        chosen.append(torch.where(copies | (ends[-1] <= 0), -1, rows[best]))
    return torch.cat(chosen)[:num_codes]


def _range(x: Tensor, usable: Tensor) -> Tensor:
    """Largest minus smallest of the usable rows, `[D]`: the same bits in any order of the rows."""
    highest = torch.where(usable[:, None], x, -torch.inf).amax(0)
    return highest - torch.where(usable[:, None], x, torch.inf).amin(0)
