"""Reset of inactive codes (Sec. 4.3): which have fallen idle, and what takes their place."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmvq_kernels.hashing import mix

UNSEEN = -1
"""The age of every code for a modality that has never had a valid vector."""
_JITTER = 0.01  # of the codebook's spread: enough to part two codes that share a donor


def advance_ages(ages: Tensor, counts: Tensor) -> Tensor:
    """Batches since each modality last chose each code.

    A modality without a valid vector in the batch does not age; one never yet seen stays at -1.

    Args:
        ages: int64 `[M, L]`.
        counts: vectors of each modality that chose each code in this batch, `[M, L]`.

    Examples:
        >>> advance_ages(torch.tensor([[3, 0], [UNSEEN, UNSEEN]]), torch.tensor([[1, 0], [0, 0]]))
        tensor([[ 0,  1],
                [-1, -1]])
    """
    present = counts.sum(1, keepdim=True) > 0
    return torch.where(present, torch.where(counts > 0, 0, ages.clamp(min=0) + 1), ages)


def dead_codes(ages: Tensor, reset_after: float, rule: Literal["all", "any"]) -> Tensor:
    """Bool `[L]`: the codes to reset.

    `"all"` keeps a code only if every modality chose it within the last `reset_after` batches (the
    paper); `"any"` keeps it if any did (the released code, which also needs more than
    `reset_after`). Modalities never yet seen do not vote.

    Examples:
        >>> ages = torch.tensor([[0, 9, 9], [0, 0, 9]])  # of three codes, for two modalities
        >>> dead_codes(ages, 5, "all"), dead_codes(ages, 5, "any")
        (tensor([False,  True,  True]), tensor([False, False,  True]))
    """
    idle, seen = ages >= reset_after, ages > UNSEEN
    if rule == "all":
        return (idle & seen).any(0)
    return (idle | ~seen).all(0) & seen.any(0)


def replacement_codes(
    codes: Tensor, dead: Tensor, batch_sums: Tensor, batch_counts: Tensor, step: Tensor
) -> Tensor:
    """Where dead codes restart: `[L, D]`, meaningful where `dead`.

    The r-th dead code takes the mean of what this batch assigned to its r-th most chosen code,
    so that crowded regions get new codes first, plus the jitter of `jittered`, which splits them.
    As that mean is over contributions `(z + r) / 2`, a replacement lies between the modalities,
    where both can reach it. No synchronisation, the same on every rank.

    Args:
        codes: `[L, D]`.
        dead: bool `[L]`.
        batch_sums: `[L, D]`, over all ranks.
        batch_counts: `[L]`.
        step: int64 scalar, the number of updates made so far.

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
    """`new` `[K, D]`, each moved by up to 1% of the spread of `codes` `[L, D]` in each dimension.

    The jitter is a hash of (step, row, dimension): no generator, the same on every rank.

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
    return torch.addcmul(new, uniform, spread * (_JITTER / 2**23))
