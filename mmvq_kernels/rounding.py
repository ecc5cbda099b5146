"""What rounding and smoothing take: where to centre the codes, which distances and N are lost."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FADED = 1000  # times eps: an N above it keeps its code, when nothing chooses it, for long


def rounded_mean(codebook: Tensor) -> Tensor:
    """The mean of the codes, rounded to a sixteenth of their spread: `[D]`.

    The step is a power of two, so that codes on a lattice stay on one, and equal scores equal.
    NaN in every place if a code is not finite.
    """
    mean = codebook.mean(0)
    spread = (codebook - mean).abs_().amax()
    step = torch.exp2(torch.floor(torch.log2(spread)) - 3)
    return torch.where(step == 0, mean, (mean / step).round() * step)


def cancellation_threshold(dtype: torch.dtype, D: int) -> float:
    """Below this share of `|x|^2`, `|x|^2 - 2 x.e + |e|^2` is rounding, and no distance.

    The rounding of a sum of D terms grows as the root of D; with `x = e`, eight times that is more
    than any draw left, in float32 as in tf32x3.
    """
    return 8 * torch.finfo(dtype).eps * math.sqrt(D)
