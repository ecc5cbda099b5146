"""TURN: reconstruct each modality from its own codes and from those of the others.

Zhao, Zhang, Huang, Li and Zhao. Towards Effective Multi-Modal Interchanges in Zero-Resource
Sounding Object Localization. NeurIPS 2022.

    L = |x^a - D^a(code^b; 0)|^2 / |x^a|^2          for all a != b

Written from the account of Xia et al. 2023, Sec. 2 ("use self-cross-reconstruction to enhance the
mutual information between different modals"): reconstruction from a modality's own code is in the
baseline already, this adds the crossed one. The place of the modality-specific features stays
empty there, or they would tell all.

Simplified: of the alignment stream only this objective; its localisation stream and its adaptive
sampling between data domains have no counterpart in these tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations

import torch
from torch import Tensor

from cmg.model import Features, UniCode

from .base import Alignment, decoder_input


class TURN(Alignment):
    """Crossed reconstruction, segment by segment."""

    def forward(
        self, model: UniCode, x: Mapping[str, Tensor], features: Features, *, quantize: bool
    ) -> Tensor:
        """The mean over all ordered pairs of modalities."""
        codes = decoder_input(model, features.semantic, quantize=quantize)
        losses = []
        for a, b in permutations(x, 2):
            nothing = torch.zeros_like(features.specific[a])
            error = model.decoder[a](codes[b], nothing) - x[a]
            losses.append(error.square().mean() / x[a].square().mean())
        return torch.stack(losses).mean()
