"""How a codebook is used: by which modality, how evenly, and what lies idle."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from mmvq_kernels.messages import message


class CodeUsage(NamedTuple):
    """What `code_usage` returns; L codes. Each code is `shared`, `single` or `dead`.

    Attributes:
        counts: modality -> int64 `[L]`, vectors that chose each code.
        perplexity: modality -> scalar in [0, L], `exp` of the entropy of its counts in nats.
        shared: bool `[L]`, codes held by two or more modalities.
        dead: bool `[L]`, codes chosen by none.
    """

    counts: dict[str, Tensor]
    perplexity: dict[str, Tensor]
    shared: Tensor
    dead: Tensor

    @property
    def single(self) -> Tensor:
        """Bool `[L]`, codes in use that no two modalities hold."""
        return ~(self.shared | self.dead)


class CodeAgreement(NamedTuple):
    """What `code_agreement` returns, for each pair of modalities (a, b).

    Attributes:
        equal: int64 scalar, positions at which both chose the same code.
        positions: int64 scalar, positions at which both chose one.
    """

    equal: dict[tuple[str, str], Tensor]
    positions: dict[tuple[str, str], Tensor]

    @property
    def share(self) -> dict[tuple[str, str], Tensor]:
        """Scalars in [0, 1], `equal / positions`; NaN where there is no position."""
        return {pair: n / self.positions[pair] for pair, n in self.equal.items()}


def code_usage(counts: Mapping[str, Tensor], min_share: float = 0.05) -> CodeUsage:
    r"""Perplexity, shared and dead codes from the counts of each modality.

    Perplexity is $\exp(-\sum_i p_i \ln p_i)$ with $p_i$ the share of code i among the modality's
    vectors (0 when it has none). A modality holds a code when more than `min_share` of the code's
    vectors are its own.

    Args:
        counts: modality -> `[L]`.
        min_share: share of a code's vectors.

    Raises:
        ValueError: no counts, or counts that are not `[L]` for one L.

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
        rule = "counts must hold a tensor [L] for each modality, of one L"
        hint = "pass quantizer.usage().counts; torch.bincount makes them of indices"
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
    r"""How often two modalities chose the same code at the same position, for all pairs.

    $$\mathrm{equal}_{ab} = \sum_{i,t} [l^a_{it} = l^b_{it} \ge 0], \qquad
      \mathrm{positions}_{ab} = \sum_{i,t} [l^a_{it} \ge 0][l^b_{it} \ge 0]$$

    Args:
        indices: modality -> int64 `[B, T]` or any other shape, the same for all; -1 (masked) never
            counts.

    Returns:
        `CodeAgreement(equal, positions)`, each pair once, in the order of `indices`.

    Raises:
        ValueError: shapes that differ.

    Source: `equal_num` of the released code, which counts the clips whose most frequent code is the
    same in all modalities.

    Examples:
        >>> indices = {"audio": torch.tensor([[3, 5, 7]]), "video": torch.tensor([[3, 4, -1]])}
        >>> code_agreement(indices).share
        {('audio', 'video'): tensor(0.5000)}
    """
    if len({index.shape for index in indices.values()}) > 1:
        raise ValueError(
            message(
                "code_agreement",
                "the indices of all modalities must have one shape [B, T]",
                hint="give modalities of one time grid; positions of different grids do not pair",
                indices=indices,
            )
        )
    equal: dict[tuple[str, str], Tensor] = {}
    positions: dict[tuple[str, str], Tensor] = {}
    for a, b in combinations(indices, 2):
        both = (indices[a] >= 0) & (indices[b] >= 0)
        equal[a, b] = (both & (indices[a] == indices[b])).sum()
        positions[a, b] = both.sum()
    return CodeAgreement(equal, positions)
