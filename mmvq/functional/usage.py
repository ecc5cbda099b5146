"""Codebook usage: perplexity, shared and dead codes, and agreement of modalities."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from mmvq_kernels.messages import message


class CodeUsage(NamedTuple):
    """Result of `code_usage` for L codes. Each code is `shared`, `single` or `dead`.

    Attributes:
        counts: number of vectors that chose each code, modality -> int64 `[L]`.
        perplexity: effective number of codes, exp of the entropy, modality -> scalar in [0, L].
        shared: codes held by two or more modalities, bool `[L]`.
        dead: codes that no vector chose, bool `[L]`.
    """

    counts: dict[str, Tensor]
    perplexity: dict[str, Tensor]
    shared: Tensor
    dead: Tensor

    @property
    def single(self) -> Tensor:
        """Codes that are neither shared nor dead, bool `[L]`."""
        return ~(self.shared | self.dead)


class CodeAgreement(NamedTuple):
    """Result of `code_agreement`, for each pair of modalities (a, b).

    Attributes:
        equal: number of positions at which both chose the same code, pair -> int64 scalar.
        positions: number of positions at which both chose a code, pair -> int64 scalar.
    """

    equal: dict[tuple[str, str], Tensor]
    positions: dict[tuple[str, str], Tensor]

    @property
    def share(self) -> dict[tuple[str, str], Tensor]:
        """Ratio `equal / positions` in [0, 1], pair -> scalar; NaN without positions."""
        return {pair: n / self.positions[pair] for pair, n in self.equal.items()}


def code_usage(counts: Mapping[str, Tensor], min_share: float = 0.05) -> CodeUsage:
    r"""Compute perplexity, shared and dead codes from the counts of each modality.

    Perplexity is $\exp(-\sum_i p_i \ln p_i)$, where $p_i$ is the fraction of the modality's vectors
    that chose code i. Without vectors it is 0. A modality holds a code if more than `min_share` of
    the code's vectors are its own.

    Args:
        counts: counts of each code, modality -> `[L]`.
        min_share: fraction of a code's vectors that a modality must exceed to hold it.

    Raises:
        ValueError: there are no counts, or they are not `[L]` with the same L.

    Source: Fig. 4, where a modality with over 80% of a code's vectors owns it alone.

    Examples:
        >>> counts = {"audio": torch.tensor([6, 2, 0]), "video": torch.tensor([8, 0, 0])}
        >>> use = code_usage(counts)
        >>> use.perplexity
        {'audio': tensor(1.7548), 'video': tensor(1.)}
        >>> use.shared, use.dead
        (tensor([ True, False, False]), tensor([False, False,  True]))
    """
    shapes = {x.shape for x in counts.values()}
    if len(shapes) != 1 or len(*shapes) != 1:
        rule = "counts must map one or more modalities to tensors [L], with the same L"
        hint = "pass quantizer.usage().counts, or torch.bincount of the indices"
        raise ValueError(message("code_usage", rule, hint=hint, counts=counts))
    stacked = torch.stack([*counts.values()])  # [M, L]
    p = stacked / stacked.sum(1, keepdim=True).clamp(min=1)
    perplexity = torch.exp(-torch.xlogy(p, p).sum(1)) * (stacked.sum(1) > 0)
    total = stacked.sum(0)
    holders = (stacked > min_share * total).sum(0)
    return CodeUsage(
        counts=dict(counts),
        perplexity=dict(zip(counts, perplexity.unbind(), strict=True)),
        shared=holders >= 2,
        dead=total == 0,
    )


def code_agreement(indices: Mapping[str, Tensor]) -> CodeAgreement:
    r"""Count how often two modalities chose the same code at the same position, for all pairs.

    $$\mathrm{equal}_{ab} = \sum_{i,t} [l^a_{it} = l^b_{it} \ge 0], \qquad
      \mathrm{positions}_{ab} = \sum_{i,t} [l^a_{it} \ge 0][l^b_{it} \ge 0]$$

    Args:
        indices: code indices, modality -> int64 `[B, T]` or any other shape, the same for all; -1
            (masked) is not counted.

    Returns:
        `CodeAgreement(equal, positions)`, each pair once, in the order of `indices`.

    Raises:
        ValueError: the shapes differ.

    Source: `equal_num` of the released code, which counts the clips whose most frequent code is the
    same in all modalities.

    Examples:
        >>> indices = {"audio": torch.tensor([[3, 5, 7]]), "video": torch.tensor([[3, 4, -1]])}
        >>> code_agreement(indices).share
        {('audio', 'video'): tensor(0.5000)}
    """
    if len({index.shape for index in indices.values()}) > 1:
        rule = "the indices of all modalities must have the same shape [B, T]"
        hint = "pass modalities with the same time grid, so that positions correspond"
        raise ValueError(message("code_agreement", rule, hint=hint, indices=indices))
    equal: dict[tuple[str, str], Tensor] = {}
    positions: dict[tuple[str, str], Tensor] = {}
    for a, b in combinations(indices, 2):
        both = (indices[a] >= 0) & (indices[b] >= 0)
        equal[a, b] = (both & (indices[a] == indices[b])).sum()
        positions[a, b] = both.sum()
    return CodeAgreement(equal, positions)
