"""How a codebook is used: by which modality, how evenly, and what lies idle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class CodeUsage(NamedTuple):
    """What `code_usage` returns; L codes.

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


def code_usage(counts: Mapping[str, Tensor], min_share: float = 0.05) -> CodeUsage:
    r"""Perplexity, shared and dead codes from the counts of each modality.

    Perplexity is $\exp(-\sum_i p_i \ln p_i)$ with $p_i$ the share of code i among the modality's
    vectors (0 when it has none). A modality holds a code when more than `min_share` of the code's
    vectors are its own.

    Args:
        counts: modality -> `[L]`.
        min_share: share of a code's vectors.

    Source: Fig. 4, where a modality with over 80% of a code's vectors owns it alone.
    """
    stacked = torch.stack([counts[name] for name in counts])  # [M, L]
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
