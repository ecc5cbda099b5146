"""Counts and sums of the vectors assigned to each code: the brackets of Eq. 7.

The Triton kernels are in `mmvq_kernels/gpu/statistics.py`, which only a GPU imports.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmvq_kernels.backends import Backend, require
from mmvq_kernels.checks import check_below
from mmvq_kernels.messages import message
from mmvq_kernels.operators import register

_MANY = 1 << 14  # rows; more are summed in float64
_BLOCK = 1 << 12  # rows at a time, for the cache


def code_statistics_ref(values: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """One row at a time, in float64.

    Examples:
        >>> code_statistics_ref(torch.ones(2, 1), torch.tensor([1, -1]), 2)[0]
        tensor([0., 1.], dtype=torch.float64)
    """
    counts = values.new_zeros(num_codes, dtype=torch.float64)
    sums = values.new_zeros(num_codes, values.shape[1], dtype=torch.float64)
    for value, index in zip(values.double(), indices.tolist(), strict=True):
        if index >= 0:
            counts[index] += 1
            sums[index] += value
    return counts, sums


def code_statistics(
    values: Tensor,
    indices: Tensor,
    num_codes: int,
    *,
    groups: Tensor | None = None,
    num_groups: int = 1,
    deterministic: bool = True,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Count and sum of the rows of each code: `n_i` and `sum_j v_ij` of Eq. 7.

    Deterministic by default: the same rows in the same order give the same bits.

    Args:
        values: vectors to sum, `[N, D]`, any float dtype; summed in at least float32, and in
            float64 if there are many.
        indices: code of each row, int64 `[N]`; a row with -1 is left out, whatever its values.
        num_codes: number of codes L.
        groups: group (modality) of each row, int64 `[N]` in `[0, num_groups)`; each group is then
            counted separately.
        num_groups: number of groups G.
        deterministic: False lets a GPU sum with float atomics instead of a sort. The last bits of
            the sums then differ between runs. The torch path is always deterministic.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        Counts, float `[L]` (`[G, L]` if `groups` is given), and sums over all groups, `[L, D]`.
        Counts are exact integers, rounded once to float.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: values that are not floating point, indices or groups that are not int64.
        IndexError: an index of L or more, a group outside [0, G) (checked on a CPU only).
        RuntimeError: the backend cannot run here.

    Examples:
        >>> counts, sums = code_statistics(torch.ones(4, 2), torch.tensor([0, 2, 2, -1]), 3)
        >>> counts, sums[:, 0]
        (tensor([1., 0., 2.]), tensor([1., 0., 2.]))
    """
    where, size = "code_statistics", "pass num_codes=L of the codebook"
    given = {"values": values, "indices": indices}
    if not values.is_floating_point() or indices.dtype != torch.long:
        rule = "values must be floating point and indices int64"
        hint = "pass the indices that nearest_code returned"
        raise TypeError(message(where, rule, hint=hint, **given))
    if values.ndim != 2 or indices.shape != values.shape[:1]:
        rule = "values [N, D] and indices [N] must have the same N"
        hint = "flatten batch and time of both in the same order"
        raise ValueError(message(where, rule, hint=hint, **given))
    check_below(where, num_codes, size, indices=indices)
    if groups is not None:
        if groups.shape != indices.shape or groups.dtype != torch.long:
            rule = "groups must be int64 with one entry for each index"
            hint = "give every row the number of its group"
            raise ValueError(message(where, rule, hint=hint, groups=groups, indices=indices))
        check_below(where, num_groups, "pass num_groups=G", signed=False, groups=groups)
    require(where, backend, values, indices, groups)
    run = accumulate_torch if backend == "torch" else accumulate
    G = 1 if groups is None else num_groups
    flat = run(values.detach(), indices, num_codes, groups, G, deterministic)
    counts, sums = split(flat, G, num_codes, values.shape[1])
    return (counts.squeeze(0) if groups is None else counts), sums


def largest_fit(dtype: torch.dtype) -> float:
    """The largest element of a vector that may enter the statistics.

    The root of the largest number over 2^14, so that sums of 2^25 squared differences of elements
    are finite: 1e15, or 8e149 in float64.
    """
    widest = torch.finfo(torch.promote_types(dtype, torch.float32)).max
    limit: float = min(torch.finfo(dtype).max, widest**0.5 / 2**14)
    return limit


def split(flat: Tensor, G: int, L: int, D: int) -> tuple[Tensor, Tensor]:
    """The counts `[G, L]` and sums `[L, D]` in what `accumulate` returned."""
    counts, sums = flat.split([G * L, L * D])
    return counts.view(G, L), sums.view(L, D)


def accumulate_torch(
    values: Tensor,
    indices: Tensor,
    num_codes: int,
    groups: Tensor | None,
    num_groups: int,
    deterministic: bool,
) -> Tensor:
    """Counts `[G, L]` and sums `[L, D]`, flat, always deterministic.

    A row is left out if its index is below 0, or its group.
    """
    (_, D), L, G = values.shape, num_codes, num_groups
    values = _wide(values)
    known = indices if groups is None else torch.minimum(indices, groups)
    rows = torch.where(known < 0, L, indices)  # the last bin is dropped
    flat = values.new_zeros(G * L + (L + 1) * D)
    _add_rows_(flat[G * L :].view(L + 1, D), values, rows)
    bins = rows if groups is None else rows.add(groups.clamp(min=0), alpha=L + 1)
    counts = bins.new_zeros(G * (L + 1))
    counts = counts.index_add_(0, bins, torch.ones_like(bins)).view(G, L + 1)
    flat[: G * L].view(G, L).copy_(counts[:, :L])
    return flat[: G * L + L * D]


accumulate: Callable[..., Tensor] = register(
    "mmvq::code_statistics",
    accumulate_torch,
    gpu="mmvq_kernels.gpu.statistics:accumulate",
    fake=lambda values, _indices, L, _groups, G, _deterministic: _wide(
        values.new_empty(G * L + L * values.shape[1])
    ),
)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _add_rows_(out: Tensor, values: Tensor, bins: Tensor) -> None:
    # The error of a sum in one dtype grows with its length.
    if values.shape[0] > _MANY and values.dtype != torch.float64:
        total = torch.zeros_like(out, dtype=torch.float64)
        for rows, places in zip(values.split(_BLOCK), bins.split(_BLOCK), strict=True):
            _add_rows_(total, rows.double(), places)
        out.copy_(total)
    elif values.device.type == "cpu":
        out.index_add_(0, bins, values)
    else:
        out.index_put_((bins,), values, accumulate=True)  # sorts: no float atomics
