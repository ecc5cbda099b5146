"""Counts and sums of the vectors assigned to each code: the brackets of Eq. 7.

The Triton kernels are in `mmvq_kernels/gpu/statistics.py`, which only a GPU imports.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmvq_kernels.backends import (
    Backend,
    register_sequential_vmap,
    require,
    runs_triton,
    through_operator,
)
from mmvq_kernels.checks import check_below
from mmvq_kernels.messages import message

_MANY = 1 << 14  # rows; more are added up in float64
_BLOCK = 1 << 12  # of these at a time, for the cache


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
    """How many rows chose each code, and their sum: `n_i` and `sum_j v_ij` of Eq. 7.

    Deterministic by default: the same rows in the same order give the same bits.

    Args:
        values: the vectors to add up, `[N, D]`, any float dtype; summed in at least float32, many
            of them in float64.
        indices: int64 `[N]`, the code of each row; a row with -1 is left out, whatever it holds.
        num_codes: L.
        groups: int64 `[N]` in `[0, num_groups)`, the group (modality) of each row, to count each
            group apart.
        num_groups: G.
        deterministic: False lets a GPU add up with float atomics, without a sort: the last bits of
            the sums then change from run to run (the torch path is always deterministic).
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        counts, float `[L]` (`[G, L]` when `groups` is given), counted as integers and rounded once,
        and sums `[L, D]` over all groups.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: values that are not floating point, indices or groups that are not int64.
        IndexError: an index of L or more, a group outside [0, G) (looked at on a CPU only).
        RuntimeError: the backend cannot run here.

    Examples:
        >>> counts, sums = code_statistics(torch.ones(4, 2), torch.tensor([0, 2, 2, -1]), 3)
        >>> counts, sums[:, 0]
        (tensor([1., 0., 2.]), tensor([1., 0., 2.]))
    """
    _check(values, indices, groups)
    check_below("code_statistics", num_codes, "pass num_codes=L of the codebook", indices=indices)
    if groups is not None:
        check_below("code_statistics", num_groups, "pass num_groups=G", signed=False, groups=groups)
    require("code_statistics", backend, values, indices, groups)
    args = values.detach(), indices, num_codes, groups, 1 if groups is None else num_groups
    if through_operator(backend, values):
        counts, sums = _code_statistics(*args, deterministic)
    else:
        counts, sums = _code_statistics_torch(*args)
    return (counts.squeeze(0) if groups is None else counts), sums


@torch.library.custom_op("mmvq::code_statistics", mutates_args=())
def _code_statistics(
    values: Tensor,
    indices: Tensor,
    num_codes: int,
    groups: Tensor | None,
    num_groups: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    return _code_statistics_torch(values, indices, num_codes, groups, num_groups)


@_code_statistics.register_kernel("cuda")
def _(
    values: Tensor,
    indices: Tensor,
    num_codes: int,
    groups: Tensor | None,
    num_groups: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    if not runs_triton(values, indices, groups):
        return _code_statistics_torch(values, indices, num_codes, groups, num_groups)
    from mmvq_kernels.gpu.statistics import accumulate

    args = values, indices, num_codes, groups, num_groups
    return accumulate(*args, deterministic=deterministic)


@_code_statistics.register_fake
def _(
    values: Tensor,
    indices: Tensor,
    num_codes: int,
    groups: Tensor | None,
    num_groups: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(values.dtype, torch.float32)
    counts = values.new_empty((num_groups, num_codes), dtype=dtype)
    return counts, values.new_empty((num_codes, values.shape[1]), dtype=dtype)


register_sequential_vmap(_code_statistics)


def _code_statistics_torch(
    values: Tensor, indices: Tensor, num_codes: int, groups: Tensor | None, num_groups: int
) -> tuple[Tensor, Tensor]:
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    left_out = indices < 0
    rows = torch.where(left_out, num_codes, indices)  # the last bin is thrown away
    sums = _add_rows(values, rows, num_codes + 1)[:num_codes]
    bins = rows if groups is None else groups * (num_codes + 1) + rows
    counts = bins.new_zeros(num_groups * (num_codes + 1))
    counts = counts.index_add_(0, bins, torch.ones_like(bins)).view(num_groups, num_codes + 1)
    return counts[:, :num_codes].to(values.dtype, memory_format=torch.contiguous_format), sums


def _add_rows(values: Tensor, bins: Tensor, num_bins: int) -> Tensor:
    if (
        values.shape[0] > _MANY and values.dtype != torch.float64
    ):  # the error of a sum in one dtype grows with its length
        total = values.new_zeros(num_bins, values.shape[1], dtype=torch.float64)
        for rows, places in zip(values.split(_BLOCK), bins.split(_BLOCK), strict=True):
            _add_rows_(total, rows.double(), places)
        return total.to(values.dtype)
    return _add_rows_(values.new_zeros(num_bins, values.shape[1]), values, bins)


def _add_rows_(out: Tensor, values: Tensor, bins: Tensor) -> Tensor:
    if values.device.type == "cpu":
        return out.index_add_(0, bins, values)
    return out.index_put_((bins,), values, accumulate=True)  # sorts: no float atomics


def _check(values: Tensor, indices: Tensor, groups: Tensor | None) -> None:
    if not values.is_floating_point() or indices.dtype != torch.long:
        raise TypeError(
            message(
                "code_statistics",
                "values must be floating point and indices int64",
                hint="pass the indices that nearest_code returned",
                values=values,
                indices=indices,
            )
        )
    if values.ndim != 2 or indices.shape != values.shape[:1]:
        raise ValueError(
            message(
                "code_statistics",
                "values [N, D] and indices [N] must have the same N",
                hint="flatten batch and time of both in the same order",
                values=values,
                indices=indices,
            )
        )
    if groups is not None and (groups.shape != indices.shape or groups.dtype != torch.long):
        raise ValueError(
            message(
                "code_statistics",
                "groups must be int64 with one entry for each index",
                hint="give every row the number of its group",
                groups=groups,
                indices=indices,
            )
        )
