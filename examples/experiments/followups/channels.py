"""Training-free selection of codebook channels (TOC).

"Enhancing Multimodal Unified Representations for Cross Modal Generalization" (Huang et al., ACL
Findings 2025) keeps the channels of a finished codebook in which codes differ most, and uses the
codes in those channels only. Nothing is trained. The authors' code loops over all pairs of codes
and can mix in the worst channels, in shares tuned for each task; here the pairs are summed in
closed form, and the best channels are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cmg.evaluation import classification

if TYPE_CHECKING:
    from ..run import TrainedRun


def channel_scores(codebook: Tensor) -> Tensor:
    """Score of every channel: -0.7 x mean product of two codes + 0.3 x variance over codes.

    With x_i the L values of a channel, the products of all ordered pairs i != j sum to
    (sum_i x_i)^2 - sum_i x_i^2, so no [L, L] is formed. The variance is the unbiased one.

    Args:
        codebook: [L, D], L at least 2.

    Returns:
        [D]; a high score is a channel to keep.
    """
    L = len(codebook)
    products = (codebook.sum(0).square() - codebook.square().sum(0)) / (L * (L - 1))
    return -0.7 * products + 0.3 * codebook.var(0)


def best_channels(codebook: Tensor, keep: int) -> Tensor:
    """The `keep` channels of the highest score, in ascending order."""
    return channel_scores(codebook).topk(keep).indices.sort().values


def select_channels(run: TrainedRun, share: float = 0.5, draws: int = 3) -> dict[str, Any]:
    """Clip accuracy with all channels, with the best, and with as many at random.

    Args:
        run: The run.
        share: Of the channels to keep.
        draws: Random choices to average over.

    Returns:
        "kept" and "channels", their numbers, and {"a->b": "all", "selected", "random", "chance"}
        under "classification".
    """
    codes, _ = run.codes
    codebook = run.model.quantizer.codebook
    D = codebook.shape[1]
    keep = max(1, round(share * D))
    generator = torch.Generator().manual_seed(run.seed)
    picks = [torch.randperm(D, generator=generator)[:keep] for _ in range(draws)]

    def accuracy(chosen: Tensor) -> dict[str, float]:
        part = {name: x[..., chosen] for name, x in codes.items()}
        scores = classification(part, run.clips, run.seed)
        return {way: own["accuracy"] for way, own in scores.items()}

    every = classification(codes, run.clips, run.seed)
    selected = accuracy(best_channels(codebook, keep))
    at_random = [accuracy(pick) for pick in picks]
    return {
        "kept": keep,
        "channels": D,
        "classification": {
            way: {
                "all": own["accuracy"],
                "selected": selected[way],
                "random": sum(found[way] for found in at_random) / draws,
                "chance": own["chance"],
            }
            for way, own in every.items()
        },
    }
