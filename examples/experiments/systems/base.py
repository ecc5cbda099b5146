"""What the systems of Table 1 have in common: the model of Sec. 4.1, one more objective.

Every system has the encoders, the shared codebook and the decoders of the baseline, and is tested
through its codes. It differs in how it aligns the modalities: in one `Alignment`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations

import torch
from torch import Tensor, nn

from cmg.model import Config, Features, UniCode

TEMPERATURE = 0.1


class Alignment(nn.Module):
    """An objective beside those of Uni-Code, and the parameters that it needs; a base class.

    Each system gives its own `forward`.

    Args:
        model: The model that it will train with; an alignment may change it before training, and
            keeps no reference to it.
    """

    def __init__(self, model: UniCode) -> None:
        super().__init__()

    def forward(
        self, model: UniCode, x: Mapping[str, Tensor], features: Features, *, quantize: bool
    ) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            model: The model in training.
            x: Name -> standardised features [B, T, P, C].
            features: What the model's encoders made of them.
            quantize: False while features are still to spread and there are no codes.
        """
        raise NotImplementedError


class System(UniCode):
    """Uni-Code, some parts left out by `config.without`, with an alignment as one more term.

    Args:
        config: What to build.
        align: Makes the alignment.
    """

    def __init__(self, config: Config, align: Callable[[UniCode], Alignment]) -> None:
        super().__init__(config)
        self.alignment = align(self)

    def losses(
        self, x: Mapping[str, Tensor], features: Features, *, quantize: bool
    ) -> dict[str, Tensor]:
        """The terms of Uni-Code, and "alignment"."""
        terms = super().losses(x, features, quantize=quantize)
        return terms | {"alignment": self.alignment(self, x, features, quantize=quantize)}


def clip_vectors(z: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A clip as one vector: the mean over time at unit length, [B, T, D] -> [B, D]."""
    return {name: nn.functional.normalize(v.mean(1), dim=-1) for name, v in z.items()}


def decoder_input(model: UniCode, z: Mapping[str, Tensor], *, quantize: bool) -> dict[str, Tensor]:
    """What the decoders see: codes [B, T, D], the gradient passed through, or features before."""
    return model.quantizer(z, freeze=True).quantized if quantize else dict(z)


def over_pairs(loss: Callable[[Tensor, Tensor], Tensor], views: Mapping[str, Tensor]) -> Tensor:
    """The mean of a symmetric loss over all pairs of modalities."""
    return torch.stack([loss(a, b) for a, b in combinations(views.values(), 2)]).mean()


def margin_softmax(a: Tensor, b: Tensor, margin: Callable[[Tensor], Tensor]) -> Tensor:
    """InfoNCE in both directions whose positives are handicapped: [B, D] twice -> a scalar.

    Args:
        a: Unit vectors, one a clip.
        b: Those of another modality, in the same order.
        margin: Cosines [B, B], a row for each query -> what its positive loses, [B] or a scalar.
    """
    target = torch.arange(len(a), device=a.device)
    cosines = a @ b.T
    losses = []
    for rows in (cosines, cosines.T):
        handicap = torch.diag(margin(rows.detach()).expand(len(rows)))
        losses.append(nn.functional.cross_entropy((rows - handicap) / TEMPERATURE, target))
    return torch.stack(losses).mean()
