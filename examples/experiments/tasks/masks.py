"""How well masks fit: mIoU and the F-score, as AVSBench defines them."""

from __future__ import annotations

import torch
from torch import Tensor

BETA_SQUARED = 0.3
THRESHOLDS = 255


def mask_scores(probability: Tensor, truth: Tensor) -> dict[str, float]:
    """Both scores of a set of masks.

    "miou" is the mean over frames of intersection over union, where a pixel is in the mask from a
    probability of 0.5 on; a frame without an object scores the share of its pixels that are left
    out. "f_score" is F = (1 + b) P R / (b P + R) with b = 0.3, averaged over the frames that have
    an object, at the best of 255 thresholds for all frames: AVSBench picks it on the frames of the
    test, so compare F with F only.

    Args:
        probability: [n, H, W], from 0 to 1.
        truth: bool [n, H, W].
    """
    return {"miou": mean_iou(probability >= 0.5, truth), "f_score": f_score(probability, truth)}


def mean_iou(mask: Tensor, truth: Tensor) -> float:
    """Mean over frames of |mask and truth| / |mask or truth|; both bool [n, H, W]."""
    mask, truth = mask.flatten(1), truth.flatten(1)
    both, either = (mask & truth).sum(1), (mask | truth).sum(1)
    left_out = (~mask).double().mean(1)
    return torch.where(truth.any(1), both / either, left_out).double().mean().item()


def f_score(probability: Tensor, truth: Tensor) -> float:
    """The best over thresholds of the mean F over frames that have an object, 0 if none has."""
    has_object = truth.flatten(1).any(1)
    if not has_object.any():
        return 0.0
    p, truth = probability[has_object].flatten(1), truth[has_object].flatten(1)
    steps = torch.linspace(0, 1, THRESHOLDS, dtype=p.dtype)
    level = torch.bucketize(p, steps, right=True) - 1  # the highest threshold that a pixel passes
    claims = _at_least(level, torch.ones_like(truth))
    hits = _at_least(level, truth)  # [n, thresholds]
    precision = hits / claims.clamp(min=1)
    recall = hits / truth.sum(1, keepdim=True)
    F = (1 + BETA_SQUARED) * precision * recall / (BETA_SQUARED * precision + recall)
    return F.nan_to_num(0).mean(0).max().item()


def _at_least(level: Tensor, counted: Tensor) -> Tensor:
    """How many counted pixels of each frame reach each level: [n, THRESHOLDS]."""
    per_level = torch.zeros(len(level), THRESHOLDS, dtype=torch.float64)
    per_level.scatter_add_(1, level, counted.double())
    return per_level.flip(1).cumsum(1).flip(1)
