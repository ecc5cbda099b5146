"""Every module with a loss or a state, for what must hold of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from quantizers import NAMES, D, L
from torch import Tensor, nn

from mmvq import (
    CLUBEstimator,
    CrossCPC,
    CrossModalCodeMatchingLoss,
    CrossModalCommitmentLoss,
    EMACodebook,
    MultiModalEMAQuantizer,
)
from mmvq.functional import info_nce

Tensors = Mapping[str, Tensor]
Loss = Callable[[Tensors, Tensors], Tensor]


def losses(
    names: Sequence[str], codes: Tensor, dtype: torch.dtype = torch.float32
) -> dict[str, Loss]:
    """Every loss as a function of features `[B, T, D]` and masks `[B, T]`.

    Args:
        names: modalities; losses of two take the first two.
        codes: `[L, D]`.
        dtype: of the parameters.
    """
    dim, (a, b) = codes.shape[1], names[:2]
    commitment, matching = CrossModalCommitmentLoss(), CrossModalCodeMatchingLoss()
    cpc = CrossCPC(dim, names, context_dim=4, first_step=0, self_weight=0.3).to(dtype)
    cosines = CrossCPC(dim, names, first_step=0, normalize=True, temperature=0.1).to(dtype)
    club = CLUBEstimator(dim, dim, hidden_dim=5).to(dtype)
    sampled = CLUBEstimator(dim, dim, hidden_dim=5, negatives="shuffled").to(dtype)

    def chosen(z: Tensors) -> dict[str, Tensor]:
        return {m: codes[torch.arange(x.shape[1]) % len(codes)].expand_as(x) for m, x in z.items()}

    def pair(loss: Callable[..., Tensor], **options: Any) -> Loss:
        return lambda z, masks: loss(z[a], z[b], mask=masks[a] & masks[b], **options)

    def one_negative(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return sampled(x, y, mask, generator=torch.Generator().manual_seed(0))

    return {
        "commitment": lambda z, masks: commitment(z, chosen(z), masks),
        "matching": lambda z, masks: matching(z, codes, masks),
        "info_nce": pair(info_nce, symmetric=True),
        "cpc": lambda z, masks: cpc(z, masks, start="all").loss,
        "cpc of cosines": lambda z, masks: cosines(z, masks, start="all").loss,
        "club": pair(club),
        "club's penalty": pair(club.penalty),
        "club, one negative": pair(one_negative),
        "likelihood": pair(club.log_likelihood),
    }


LOSSES = tuple(losses(NAMES, torch.ones(1, 1)))

MODULES: dict[str, Callable[..., nn.Module]] = {
    "quantizer": lambda **options: MultiModalEMAQuantizer(D, L, NAMES, **options),
    "codebook": lambda **options: EMACodebook(D, L, **options),
    "cpc": lambda **options: CrossCPC(D, NAMES, **options),
    "club": lambda **options: CLUBEstimator(D, D, **options),
    "matching": lambda **options: CrossModalCodeMatchingLoss(**options),
}
