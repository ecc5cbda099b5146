"""TURN: reconstruct each modality from its own codes and from those of the others.

Zhao, Zhang, Huang, Li and Zhao. Towards Effective Multi-Modal Interchanges in Zero-Resource
Sounding Object Localization. NeurIPS 2022.

    L = |x^a - D^a(code^b; 0)|^2 / |x^a|^2          for all a != b

This follows the summary in Xia et al. 2023, Sec. 2 ("use self-cross-reconstruction to enhance the
mutual information between different modals"). The baseline already reconstructs each modality from
its own codes; this adds reconstruction from the codes of the others. The modality-specific features
are replaced by zeros, because they alone would suffice.

Simplified: this is the only objective of its alignment stream; its localisation stream and its
adaptive sampling between data domains have no counterpart in these tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations

import torch
from torch import Tensor

from cmg.model import Features, UniCode

from .base import Alignment, decoder_input


class TURN(Alignment):
    """Reconstruction of each segment from the codes of other modalities."""

    def forward(
        self, model: UniCode, x: Mapping[str, Tensor], features: Features, *, quantize: bool
    ) -> Tensor:
        """The mean over all ordered pairs of modalities."""
        codes = decoder_input(model, features.semantic, quantize=quantize)
        losses = []
        for a, b in permutations(x, 2):
            zeros = torch.zeros_like(features.specific[a])
            error = model.decoder[a](codes[b], zeros) - x[a]
            losses.append(error.square().mean() / x[a].square().mean())
        return torch.stack(losses).mean()
