"""The common parts of the systems of Table 1: the model of Sec. 4.1 and an alignment objective.

Every system has the encoders, the shared codebook and the decoders of the baseline, and is tested
on its codes. Systems differ only in their `Alignment` of the modalities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations

import torch
from torch import Tensor, nn

from cmg.batches import Batch
from cmg.model import Config, Features, UniCode

TEMPERATURE = 0.1


class Alignment(nn.Module):
    """Base class of an objective that is added to those of Uni-Code, with its parameters.

    Args:
        model: Model to be trained. An alignment may modify it, and keeps no reference to it.
    """

    def __init__(self, model: UniCode) -> None:
        super().__init__()

    def forward(
        self, model: UniCode, x: Mapping[str, Tensor], features: Features, *, quantize: bool
    ) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            model: Model in training.
            x: Name -> standardised features [B, T, P, C].
            features: Outputs of the model's encoders.
            quantize: Whether the codebook is used yet, see `UniCode.losses`.
        """
        raise NotImplementedError


class System(UniCode):
    """Uni-Code without the parts in `config.without`, with an alignment as one more term.

    Args:
        config: Settings of the model.
        align: Builds the alignment, given the model.
    """

    def __init__(self, config: Config, align: Callable[[UniCode], Alignment]) -> None:
        super().__init__(config)
        self.alignment = align(self)

    def losses(self, batch: Batch, features: Features, *, quantize: bool) -> dict[str, Tensor]:
        """Compute the terms of Uni-Code, and "alignment".

        Raises:
            ValueError: The batch has masks, which alignments do not know.
        """
        if batch.masks is not None:
            raise ValueError("System: the earlier systems take no masks; got a batch with masks.")
        terms = super().losses(batch, features, quantize=quantize)
        aligned = self.alignment(self, batch.features, features, quantize=quantize)
        return terms | {"alignment": aligned}


def clip_vectors(z: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Clips as vectors: the mean over time, normalised to unit length, [B, T, D] -> [B, D]."""
    return {name: nn.functional.normalize(v.mean(1), dim=-1) for name, v in z.items()}


def decoder_input(model: UniCode, z: Mapping[str, Tensor], *, quantize: bool) -> dict[str, Tensor]:
    """The input of the decoders: codes [B, T, D] (straight-through), or features before those."""
    return model.quantizer(z, freeze=True).quantized if quantize else dict(z)


def over_pairs(loss: Callable[[Tensor, Tensor], Tensor], views: Mapping[str, Tensor]) -> Tensor:
    """The mean of a symmetric loss over all pairs of modalities."""
    return torch.stack([loss(a, b) for a, b in combinations(views.values(), 2)]).mean()


def margin_softmax(a: Tensor, b: Tensor, margin: Callable[[Tensor], Tensor]) -> Tensor:
    """InfoNCE in both directions with a margin on positives: [B, D] twice -> a scalar.

    Args:
        a: Unit vectors of the clips in one modality.
        b: Unit vectors of the same clips in another modality.
        margin: Function of cosines [B, B], a row for each query, to margins [B] or a scalar. It
            has a gradient.
    """
    target = torch.arange(len(a), device=a.device)
    cosines = a @ b.T
    losses = []
    for rows in (cosines, cosines.T):
        margins = torch.diag(margin(rows).expand(len(rows)))
        losses.append(nn.functional.cross_entropy((rows - margins) / TEMPERATURE, target))
    return torch.stack(losses).mean()
