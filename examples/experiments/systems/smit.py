"""S-MiT: a contrastive loss with an adaptive margin.

Monfort, Jin, Liu, Harwath, Feris, Glass and Oliva. Spoken Moments: Learning Joint Audio-Visual
Representations from Video Descriptions. CVPR 2021.

    L = -1/B sum_i ln exp(s_ii - M_i) / (exp(s_ii - M_i) + sum_{j != i} exp(s_ij))       (Eq. 2)
    M_i = alpha (s_ii - mean_{j != i} s_ij)                      adaptive mean margin    (Eq. 3)

in both directions, with alpha = 0.5, the best of the paper's Table 10. M has a gradient, as there.

Simplified: s is the cosine of mean semantic features over a temperature of 0.1, where the paper
uses the dot product of pooled and projected features of deep networks. The two directions are
averaged, not added.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cmg.model import Features, UniCode

from .base import Alignment, clip_vectors, margin_softmax, over_pairs

ALPHA = 0.5


class SMiT(Alignment):
    """Contrasts clips, with a margin that grows as positives and negatives separate."""

    def forward(
        self, model: UniCode, x: Mapping[str, Tensor], features: Features, *, quantize: bool
    ) -> Tensor:
        """The mean over all pairs of modalities."""
        clips = clip_vectors(features.semantic)
        return over_pairs(lambda a, b: margin_softmax(a, b, adaptive_mean_margin), clips)


def adaptive_mean_margin(cosines: Tensor) -> Tensor:
    """M of every row of [B, B]: alpha times the difference of positive and mean negative."""
    positive = cosines.diagonal()
    negative = (cosines.sum(1) - positive) / max(len(cosines) - 1, 1)
    return ALPHA * (positive - negative)
