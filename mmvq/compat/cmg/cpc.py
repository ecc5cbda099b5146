"""The released Cross-CPC.

Source: haihuangcode/CMG, code/src/model/CPC.py. Shapes: B batch size, T time, D feature dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from mmvq.checks import message
from mmvq.compat.cmg.checks import modality_names, sequences

SELF_WEIGHT = 0.1


class CMGCPCOutput(NamedTuple):
    """Output of `CMGCrossCPC`."""

    loss: Tensor  # scalar
    accuracy: dict[tuple[str, str], Tensor]  # (source, target) -> scalar, in the released order


def contrast(targets: Tensor, predictions: Tensor) -> Tensor:
    """-sum_i log softmax over PREDICTIONS of z_i . p_j at j = i: [B, D] and [B, D] -> scalar.

    Eq. 6 normalises over the targets. As released, the roles are exchanged, so that a bias of the
    predictor gets no gradient. mmvq normalises over the targets, or as released with
    `normalize_over="contexts"`.
    """
    return -torch.log_softmax(targets @ predictions.T, dim=1).diagonal().sum()


def contrast_accuracy(targets: Tensor, predictions: Tensor) -> Tensor:
    """Share of predictions whose best target is their own, after the softmax of `contrast`.

    [B, D] and [B, D] -> scalar, always float32. As released, the argmax is over the other axis
    than the softmax of the loss; mmvq takes both over the same axis.
    """
    best = torch.softmax(targets @ predictions.T, dim=1).argmax(dim=0)
    return (best == torch.arange(len(best), device=best.device)).sum().float() / len(best)


def directions(modalities: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs (source, target) in the released order: backwards, forwards, then within a modality."""
    pairs = list(combinations(modalities, 2))
    return [(b, a) for a, b in pairs] + pairs + [(m, m) for m in modalities]


class CMGCrossCPC(nn.Module):
    """The released Cross-CPC of two or three modalities.

    The whole batch has one t. The context c is the last output of LSTM(z[:, :t + 1]). For
    k = 1..K, source m and target n, the predictions W_k c^m are contrasted with z^n[:, t + k]. The
    loss is the sum over k and directions, with weight 1 across modalities and 0.1 within one,
    divided by B K only. At chance it is 2.2 ln B for two modalities and 6.3 ln B for three.
    `mmvq.CrossCPC` averages over directions and uses every t.

    Args:
        dim: feature dimension D.
        modalities: two or three names. Released: ("video", "audio"), ("audio", "video", "text").
        context_dim: width of the LSTMs; D if None.
        num_layers: number of layers of each LSTM. The paper has one.
        num_steps: number of predicted steps K.

    Raises:
        ValueError: there are not two or three modalities, or a name appears twice.
    """

    def __init__(
        self,
        dim: int,
        modalities: Sequence[str] = ("video", "audio"),
        *,
        context_dim: int | None = None,
        num_layers: int = 2,
        num_steps: int = 1,
    ) -> None:
        super().__init__()
        self.modalities: tuple[str, ...] = modality_names("CMGCrossCPC", modalities)
        self.dim = dim
        self.num_steps = num_steps
        width = dim if context_dim is None else context_dim
        for name in self.modalities:
            lstm = nn.LSTM(dim, width, num_layers, batch_first=True)
            self.add_module(f"{name}_ar_lstm", lstm)
            predictors = nn.ModuleList(nn.Linear(width, dim) for _ in range(num_steps))
            self.add_module(f"{name}_predictors", predictors)

    def forward(
        self,
        features: Mapping[str, Tensor],
        *,
        start: int | None = None,
        generator: torch.Generator | None = None,
    ) -> CMGCPCOutput:
        """Return the loss, summed over all steps and directions, and the last step's accuracy.

        Args:
            features: modality -> features [B, T, D], all of one shape.
            start: time step t, from 1 to T - K - 1; drawn uniformly if None.
            generator: random generator for that draw, on the CPU.

        Raises:
            ValueError: the names differ from `modalities`, or `start` is out of range.
        """
        z = sequences("CMGCrossCPC", features, self.modalities, self.dim)
        B, T, _ = z[0].shape
        K, last = self.num_steps, T - self.num_steps - 1
        if last < 1 or (start is not None and not 1 <= start <= last):
            rule = "start must lie in [1, T - K - 1]"
            hint = f"T must be at least K + 2 = {K + 2}; leave start out to have it drawn"
            raise ValueError(message("CMGCrossCPC", rule, hint=hint, T=T, K=K, start=start))
        if start is None:
            start = int(torch.randint(1, last + 1, (1,), generator=generator))
        predictions = {m: self._predict(m, features[m][:, : start + 1]) for m in self.modalities}
        loss = z[0].new_zeros(())
        accuracy: dict[tuple[str, str], Tensor] = {}
        for source, target in directions(self.modalities):
            weight = SELF_WEIGHT if source == target else 1.0
            for k, predicted in enumerate(predictions[source], start=1):
                future = features[target][:, start + k]  # [B, D]
                loss = loss + weight * contrast(future, predicted)
                accuracy[source, target] = contrast_accuracy(future, predicted)
        return CMGCPCOutput(loss / (B * K), accuracy)

    def _predict(self, modality: str, past: Tensor) -> list[Tensor]:
        """Return W_1 c, ..., W_K c of one modality: past [B, t + 1, D] -> K x [B, D]."""
        context: Tensor = self.get_submodule(f"{modality}_ar_lstm")(past)[0][:, -1]
        predictors = cast(nn.ModuleList, self.get_submodule(f"{modality}_predictors"))
        return [predictor(context) for predictor in predictors]
