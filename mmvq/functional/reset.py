"""Reset of dead codes (Sec. 4.3): which codes are dead, and what replaces them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmvq_kernels.ema import JITTER
from mmvq_kernels.hashing import mix

UNSEEN = -1
"""The age of every code for a modality without any valid vector so far."""


def advance_ages(ages: Tensor, counts: Tensor) -> Tensor:
    """Update the number of batches since each modality last chose each code.

    A modality without a valid vector in the batch does not age; one not yet seen stays at -1.

    Args:
        ages: ages before the batch, int64 `[M, L]`.
        counts: number of vectors of each modality that chose each code in this batch, `[M, L]`.

    Examples:
        >>> advance_ages(torch.tensor([[3, 0], [UNSEEN, UNSEEN]]), torch.tensor([[1, 0], [0, 0]]))
        tensor([[ 0,  1],
                [-1, -1]])
    """
    present = counts.sum(1, keepdim=True) > 0
    return torch.where(present, torch.where(counts > 0, 0, ages.clamp(min=0) + 1), ages)


def dead_codes(ages: Tensor, reset_after: float, rule: Literal["all", "any"]) -> Tensor:
    """Which codes are dead, and are to be reset: bool `[L]`.

    `"all"` keeps a code only if every modality chose it within the last `reset_after` batches (the
    paper); `"any"` keeps it if any did (the released code, whose ages must exceed `reset_after`).
    Modalities not yet seen are ignored.

    Examples:
        >>> ages = torch.tensor([[0, 9, 9], [0, 0, 9]])  # of three codes, for two modalities
        >>> dead_codes(ages, 5, "all"), dead_codes(ages, 5, "any")
        (tensor([False,  True,  True]), tensor([False, False,  True]))
    """
    expired, seen = ages >= reset_after, ages > UNSEEN
    if rule == "all":
        return (expired & seen).any(0)
    return (expired | ~seen).all(0) & seen.any(0)


def replacement_codes(
    codes: Tensor, dead: Tensor, batch_sums: Tensor, batch_counts: Tensor, step: Tensor
) -> Tensor:
    """Compute replacements of dead codes: `[L, D]`, defined only where `dead`.

    The r-th dead code becomes the mean of the vectors that chose the r-th most chosen code of this
    batch, plus the jitter of `jittered`, which separates the two. Crowded regions thus get new
    codes first. That mean is over contributions `(z + r) / 2`, so that a replacement lies between
    the modalities, within reach of both. Needs no synchronisation; bit-identical on every rank.

    Args:
        codes: codes `[L, D]`.
        dead: codes to replace, bool `[L]`.
        batch_sums: sums of the batch over all ranks, `[L, D]`.
        batch_counts: counts of the batch over all ranks, `[L]`.
        step: number of updates made so far, int64 scalar.

    Source: the paper says "re-initialized"; the released code draws a random active code plus
    U(-1/1024, 1/1024).

    Examples:
        >>> codes, dead = torch.tensor([[0.0], [8.0]]), torch.tensor([False, True])
        >>> sums, counts = torch.tensor([[6.0], [0.0]]), torch.tensor([3.0, 0.0])
        >>> new = replacement_codes(codes, dead, sums, counts, torch.tensor(0))
        >>> (new[1] - 2).abs() <= 0.04  # the mean of code 0, and at most 1% of the spread
        tensor([True])
    """
    order = batch_counts.argsort(descending=True, stable=True)
    rank = dead.long().cumsum(0) - 1
    donors = order[rank % (batch_counts > 0).sum().clamp(min=1)]  # [L]
    means = batch_sums[donors] / batch_counts[donors, None].clamp(min=1)
    return jittered(means, codes, step)


def jittered(new: Tensor, codes: Tensor, step: Tensor) -> Tensor:
    """Move `new` `[K, D]` by up to 1% of the spread of `codes` `[L, D]` in each dimension.

    The jitter is a hash of (step, row, dimension). It is bit-identical on every rank.

    Examples:
        >>> new = jittered(torch.zeros(3, 1), torch.tensor([[-1.0], [1.0]]), torch.tensor(0))
        >>> (new.abs() <= 0.01).all(), new.unique().numel()
        (tensor(True), 3)
    """
    K, D = new.shape
    keys = mix(torch.arange(K, device=codes.device) + mix(step))
    factors = mix(torch.arange(D, device=codes.device)).bitwise_or_(1)
    uniform = (keys[:, None] * factors).bitwise_right_shift_(40).to(codes.dtype)  # [-2^23, 2^23)
    spread = (codes - codes.mean(0)).square_().mean(0).sqrt_()  # [D]; `std` is 14 times slower
    return torch.addcmul(new, uniform, spread * JITTER)
