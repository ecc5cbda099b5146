"""MST: one Transformer for all modalities, and CLIP's contrastive loss.

You, Zhou, Xiao, Codella, Cheng, Xu, Chang and Yuan. Learning Visual Representation from
Modality-Shared Contrastive Language-Image Pre-training. ECCV 2022 (MS-CLIP).

The weights of attention and feed-forward layers are shared. Each modality has its own input layers,
normalisation and output projection, which that paper found best. The loss is symmetric InfoNCE of
clips.

Simplified: the Transformer has one layer, so there is no modality-specific first layer and no
parallel branch of convolutions. The projection to the first half of z is shared, because the
Transformer's input is computed from that half. A clip is the mean of its features instead of a
class token. The temperature is fixed at 0.1, as in the other systems.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from cmg.model import Features, UniCode
from mmvq import functional

from .base import TEMPERATURE, Alignment, clip_vectors, over_pairs

SHARED = (
    "segment.0",
    "recall",
    "context.self_attn",
    "context.linear1",
    "context.linear2",
)


class MST(Alignment):
    """Shares weights of the semantic encoders, and contrasts clips."""

    def __init__(self, model: UniCode) -> None:
        super().__init__(model)
        first, *others = model.semantic.values()
        for encoder in others:
            for name in SHARED:
                encoder.set_submodule(name, first.get_submodule(name))

    def forward(
        self, model: UniCode, x: Mapping[str, Tensor], features: Features, *, quantize: bool
    ) -> Tensor:
        """The mean over all pairs of modalities."""
        contrast = partial(functional.info_nce, temperature=TEMPERATURE, symmetric=True)
        return over_pairs(contrast, clip_vectors(features.semantic))
