"""CMCM: code matching between modalities, and a contrastive loss of clips.

Liu, Jin, Lai, Rouditchenko, Oliva and Glass. Cross-Modal Discrete Representation Learning.
arXiv:2106.05438, 2021.

    L = L_MMS + L_CMCM

L_CMCM makes two modalities of a clip use the same codes. It is `CrossModalCodeMatchingLoss`, which
is also a part of Uni-Code ("matching" in `Config`). L_MMS, masked margin softmax, is InfoNCE of
clips with a small constant margin.

Simplified: a clip is the mean over time of features plus codes, where the paper projects both. The
masks of false negatives are left out, because there are none.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cmg.model import Features, UniCode

from .base import Alignment, clip_vectors, decoder_input, margin_softmax, over_pairs

MARGIN = 0.001


class CMCM(Alignment):
    """L_MMS; L_CMCM is a term of the model."""

    def forward(
        self, model: UniCode, x: Mapping[str, Tensor], features: Features, *, quantize: bool
    ) -> Tensor:
        """The mean over all pairs of modalities."""
        codes = decoder_input(model, features.semantic, quantize=quantize)
        clips = clip_vectors({name: v + codes[name] for name, v in features.semantic.items()})
        return over_pairs(lambda a, b: margin_softmax(a, b, _constant), clips)


def _constant(cosines: Tensor) -> Tensor:
    return cosines.new_tensor(MARGIN)
