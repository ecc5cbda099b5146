"""CMCM: code matching between modalities, and a contrastive loss of whole clips.

Liu, Jin, Lai, Rouditchenko, Oliva and Glass. Cross-Modal Discrete Representation Learning.
arXiv:2106.05438, 2021.

    L = L_MMS + L_CMCM

L_CMCM asks two modalities of a clip to use the same codes and is `CrossModalCodeMatchingLoss`, a
part of Uni-Code too ("matching" in `Config`). L_MMS, masked margin softmax, is InfoNCE with a small
constant margin, between clips described by features and codes together.

Simplified: clips are means over time of features plus codes, where the paper projects both; known
false negatives, which the masks would leave out, do not occur.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cmg.model import Features, UniCode

from .base import Alignment, clip_vectors, decoder_input, margin_softmax, over_pairs

MARGIN = 0.001


class CMCM(Alignment):
    """L_MMS; L_CMCM comes with the model."""

    def forward(
        self, model: UniCode, x: Mapping[str, Tensor], features: Features, *, quantize: bool
    ) -> Tensor:
        """The mean over all pairs of modalities."""
        codes = decoder_input(model, features.semantic, quantize=quantize)
        clips = clip_vectors({name: v + codes[name] for name, v in features.semantic.items()})
        return over_pairs(lambda a, b: margin_softmax(a, b, _constant), clips)


def _constant(cosines: Tensor) -> Tensor:
    return cosines.new_tensor(MARGIN)
