"""CMCM: code matching between the modalities of a clip, and a contrastive loss of clips.

Liu, Jin, Lai, Rouditchenko, Oliva and Glass. Cross-Modal Discrete Representation Learning.
arXiv:2106.05438, 2021.

    L = L_MMS + 0.1 L_CMCM

L_CMCM, `code_matching`, makes two modalities of a clip use the same codes, equally often. It is
also a part of Uni-Code ("matching" in `cmg.model.Config.without`). L_MMS, masked margin softmax, is
InfoNCE of clips with a small constant margin.

Simplified: a clip is the mean over time of features plus codes, where the paper projects both. The
margin does not grow. False negatives are not masked, because labels are not used.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cmg.model import Features, UniCode
from mmvq.functional import code_matching

from .base import Alignment, clip_vectors, decoder_input, margin_softmax, over_pairs

MARGIN = 0.001
MATCHING = 0.1  # weight of L_CMCM


class CMCM(Alignment):
    """L_MMS, and L_CMCM as soon as there are codes."""

    def forward(
        self, model: UniCode, x: Mapping[str, Tensor], features: Features, *, quantize: bool
    ) -> Tensor:
        """The mean over all pairs of modalities."""
        codes = decoder_input(model, features.semantic, quantize=quantize)
        clips = clip_vectors({name: v + codes[name] for name, v in features.semantic.items()})
        loss = over_pairs(lambda a, b: margin_softmax(a, b, _constant), clips)
        if quantize:
            loss = loss + MATCHING * code_matching(features.semantic, model.quantizer.codebook)
        return loss


def _constant(cosines: Tensor) -> Tensor:
    return cosines.new_tensor(MARGIN)
