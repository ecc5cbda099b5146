"""Scores of segmentation masks: mIoU and F-score, as defined by AVSBench."""

from __future__ import annotations

import torch
from torch import Tensor

BETA_SQUARED = 0.3
THRESHOLDS = 255


def mask_scores(probability: Tensor, truth: Tensor) -> dict[str, float]:
    """Both scores of a set of masks.

    "miou" is the mean over frames of intersection over union. A pixel is in the mask if its
    probability is 0.5 or more. The score of a frame without an object is the share of its pixels
    outside the mask. "f_score" is F = (1 + b) P R / (b P + R) with b = 0.3, averaged over the
    frames with an object, at the best of 255 thresholds for all frames. As in AVSBench, the
    threshold is chosen on the test frames, so that F can only be compared with other F.

    Args:
        probability: Probabilities [n, H, W].
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
    """Mean F over the frames with an object, at the best threshold; 0 without such frames."""
    has_object = truth.flatten(1).any(1)
    if not has_object.any():
        return 0.0
    p, truth = probability[has_object].flatten(1), truth[has_object].flatten(1)
    steps = torch.linspace(0, 1, THRESHOLDS, dtype=p.dtype)
    level = torch.bucketize(p, steps, right=True) - 1  # the highest threshold below each pixel
    claims = _at_least(level, torch.ones_like(truth))
    hits = _at_least(level, truth)  # [n, thresholds]
    precision = hits / claims.clamp(min=1)
    recall = hits / truth.sum(1, keepdim=True)
    F = (1 + BETA_SQUARED) * precision * recall / (BETA_SQUARED * precision + recall)
    return F.nan_to_num(0).mean(0).max().item()


def _at_least(level: Tensor, counted: Tensor) -> Tensor:
    """Number of counted pixels in each frame at or above each level: [n, THRESHOLDS]."""
    per_level = torch.zeros(len(level), THRESHOLDS, dtype=torch.float64)
    per_level.scatter_add_(1, level, counted.double())
    return per_level.flip(1).cumsum(1).flip(1)
