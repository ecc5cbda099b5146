"""CODIS: optimal assignments of clips to prototypes, with momentum encoders as teachers.

Duan, Chen, Tran, Yang, Xu, Zeng and Chilimbi. Multi-modal Alignment using Representation Codebook.
CVPR 2022.

With clips z of the student, z' of the teacher (a slow average of the student) and prototypes C:

    T_a = Sinkhorn(z'_a C^T)            the optimal transport plan of clips to prototypes
    L = (InfoNCE(z_a, z'_b) + InfoNCE(z_a, z'_a)) / 2     across and within modalities
      + H(T_b, softmax(z_a C^T / tau))  the teacher of one modality supervises another's student
      + <T_a, 1 - z_a C^T>              the cost of transport, which also trains the prototypes

Simplified: no queue of negatives from earlier batches, no fusion encoder and none of its
objectives. Instead of 4,000 prototypes there are 16, fewer than the clips of a batch, since each
gets an equal part of it. The teachers follow faster (a momentum of 0.99 instead of 0.995), since
training is shorter. The plan is Sinkhorn's, with an entropy, where the paper approximates the plan
without one. The prototypes are separate from the codebook.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import permutations

import torch
from torch import Tensor, nn

from cmg.model import Features, UniCode
from mmvq import functional

from .base import TEMPERATURE, Alignment, clip_vectors

PROTOTYPES = 16
MOMENTUM = 0.99
SHARPNESS = 0.05  # weight of the entropy of the transport plan
ROUNDS = 3  # iterations of Sinkhorn


class CODIS(Alignment):
    """Prototypes, and a teacher of each semantic encoder."""

    def __init__(self, model: UniCode) -> None:
        super().__init__(model)
        self.teacher = copy.deepcopy(model.semantic).requires_grad_(False)
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, model.config.dim))

    def forward(
        self, model: UniCode, x: Mapping[str, Tensor], features: Features, *, quantize: bool
    ) -> Tensor:
        """The mean over all ordered pairs of modalities."""
        students = clip_vectors(features.semantic)
        teachers = self._teach(model, x)
        prototypes = nn.functional.normalize(self.prototypes, dim=-1)
        plans = {name: transport_plan(v @ prototypes.detach().T) for name, v in teachers.items()}
        losses = []
        for a, b in permutations(students, 2):
            scores = students[a] @ prototypes.T  # [B, K]
            across, within = (
                functional.info_nce(students[a], teachers[m], temperature=TEMPERATURE)
                for m in (b, a)
            )
            guided = nn.functional.cross_entropy(scores / TEMPERATURE, plans[b])
            cost = (plans[a] * (1 - scores)).sum(-1).mean()
            losses.append((across + within) / 2 + guided + cost)
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _teach(self, model: UniCode, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Update the teachers towards their students, and return their clip vectors."""
        if self.training:
            pairs = zip(self.teacher.parameters(), model.semantic.parameters(), strict=True)
            for slow, fast in pairs:
                slow.lerp_(fast, 1 - MOMENTUM)
        return clip_vectors({name: self.teacher[name](v) for name, v in x.items()})


@torch.no_grad()
def transport_plan(scores: Tensor) -> Tensor:
    """Sinkhorn's algorithm: scores [B, K] to rows of sum 1 and columns of about equal sums."""
    log = scores / SHARPNESS
    for _ in range(ROUNDS):
        log = log.log_softmax(0).log_softmax(1)
    return log.exp()
