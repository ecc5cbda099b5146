"""A codebook that goes on with more groups or more codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmvq import functional as F
from mmvq.codebook import EMACodebook


@torch.no_grad()
def grow(new: EMACodebook, old: EMACodebook, rows: Sequence[int]) -> None:
    """Make `new` go on from `old`, which has no more codes and groups.

    What was there is there to the bit. A new group was never seen. A new code begins beside one of
    the most used, by the jitter of `functional.jittered`, with N = 1.

    Args:
        new: as built, on the device of `old`; written.
        old: where to go on from.
        rows: the group of `new` that each group of `old` is.
    """
    new.match_dtype(old.weight.dtype)
    if not bool(old.initialized):  # the first batch gives all codes
        return
    L, added = old.size, new.size - old.size
    donors = old.counts.argsort(descending=True, stable=True)
    donors = donors[torch.arange(added, device=donors.device) % L]
    codes = F.jittered(old.codes[donors], old.codes, old.steps)
    counts = torch.cat([old.counts, torch.ones_like(old.counts[donors])])
    sums = codes * F.laplace_smoothing(counts, new.eps)[L:, None]
    new.begin(torch.cat([old.codes, codes]), counts, torch.cat([old.sums, sums]))
    new.steps.copy_(old.steps)
    new.ages.fill_(F.UNSEEN)
    seen = (old.ages > F.UNSEEN).any(1)  # by groups
    for row, mine in enumerate(rows):
        new.ages[mine, L:] = torch.where(seen[row], 0, F.UNSEEN)
        new.ages[mine, :L] = old.ages[row]
        new.usage[mine, :L] = old.usage[row]
