"""TURN: contrast clips, and rebuild the masked segments of one modality from the code of another.

Zhao, Zhang, Huang, Li and Zhao. Towards Effective Multi-Modal Interchanges in Zero-Resource
Sounding Object Localization. NeurIPS 2022.

    L = InfoNCE(mean z_a, mean z_b)                              before quantization     (Eq. 7)
      + mean over masked segments of |Omega_a(mean code_b; masked x_a) - x_a|, a != b    (Eq. 5, 9)

Omega is a Transformer decoder that attends to a single vector, the code of the clip in the other
modality. Both terms have equal weight, as in the released code.

Simplified: the code of a clip is the mean of its segments' codes, where the paper quantizes the
mean with a product codebook of two parts. All modalities are rebuilt with an L1 error, relative to
the mean absolute value. The share of masked segments is drawn between 0.5 and 1 in every step,
where it grows from 0.5 to 1. InfoNCE is symmetric. Data of one modality alone, the localisation
stream and the adaptive sampling between domains have no counterpart here. The place of a segment
is that among the segments of the step, which are a part of the clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import permutations

import torch
from einops import rearrange
from torch import Tensor, nn

from cmg.model import Features, UniCode
from mmvq import functional

from .base import TEMPERATURE, Alignment, clip_vectors, decoder_input, over_pairs


class TURN(Alignment):
    """The terms of TURN's alignment stream, with a decoder Omega of each modality."""

    def __init__(self, model: UniCode) -> None:
        super().__init__(model)
        c = model.config
        self.rebuild = nn.ModuleDict(
            {name: Rebuild(P * C, c.segments, c.dim, c.heads) for name, (P, C) in c.shapes.items()}
        )

    def forward(
        self, model: UniCode, x: Mapping[str, Tensor], features: Features, *, quantize: bool
    ) -> Tensor:
        """The mean over all pairs of modalities, and over all ordered pairs."""
        codes = decoder_input(model, features.semantic, quantize=quantize)
        clips = {name: code.mean(1) for name, code in codes.items()}
        rebuilt = [self.rebuild[a](x[a], clips[b]) for a, b in permutations(x, 2)]
        contrast = partial(functional.info_nce, temperature=TEMPERATURE, symmetric=True)
        return over_pairs(contrast, clip_vectors(features.semantic)) + torch.stack(rebuilt).mean()


class Rebuild(nn.Module):
    """Omega: masked segments of one modality from the others and the code of another modality.

    Args:
        width: Number of features of a segment.
        segments: Number of segments at most.
        dim: Dimension of the code, also the hidden width.
        heads: Number of attention heads.
    """

    def __init__(self, width: int, segments: int, dim: int, heads: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(width, dim), nn.Linear(dim, width)
        self.mask = nn.Parameter(torch.zeros(width))
        self.place = nn.Parameter(0.02 * torch.randn(segments, dim))
        self.layer = nn.TransformerDecoderLayer(dim, heads, 2 * dim, 0.0, batch_first=True)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """The error of clips [B, T, P, C], given codes [B, D]; a scalar."""
        x = rearrange(x, "b t p c -> b t (p c)")
        share = 0.5 + 0.5 * torch.rand((), device=x.device)
        hidden = torch.rand(x.shape[:2], device=x.device) < share
        hidden[torch.arange(len(x)), torch.randint(x.shape[1], (len(x),))] = True  # one or more
        seen = self.enter(torch.where(hidden[..., None], self.mask, x)) + self.place[: x.shape[1]]
        error = self.leave(self.layer(seen, code[:, None])) - x
        return error[hidden].abs().mean() / x.abs().mean().clamp(min=1e-6)
