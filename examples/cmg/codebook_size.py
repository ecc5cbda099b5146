"""Choose the number of codes from clips without labels.

With few codes, modalities agree on them, but a code says little about its segment. With many, each
modality chooses among near-equal codes by what only it sees, so that modalities agree less. In
between, the mutual information of the codes of two modalities at the same segment is highest. It is
measured on clips that the encoders are not trained on: half of them estimates P(b | a), the
distribution of the code of one modality given that of another, and the other half measures

    I = mean over segments of ln P(b | a) / P(b)    [nats]

a held-out estimate of the mutual information, which is usually too low. It falls where there are
too many codes for the data. The weight of the prior of P(b | a) is the best of a few. Of the sizes
whose I is about the highest, the largest is taken: its codes tell more of their own modality.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations

import torch
from torch import Tensor

from mmvq.functional import kmeans, nearest_code

SIZES = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_TOLERANCE = 0.01  # nats that count as nothing: less can be sampling error
_PRIORS = (1.0, 3.0, 10.0, 30.0)  # weight of P(b) in P(b | a), in segments


def choose_codes(
    features: Mapping[str, Tensor],
    held_out: Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None = None,
    held_out_masks: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The first codes [L, D]. L is the largest of SIZES whose I is about the highest.

    Where no I is above 0 by more than sampling error, L is the smallest of SIZES. A size counts
    only if more of its codes are in use than of the smaller ones: with fewer vectors than codes,
    some codes are repetitions.

    Args:
        features: Name -> features [N, T, D] of the clips to train on. The codes are k-means centres
            of the means over the modalities.
        held_out: Name -> features [N', T, D] of other clips, to measure I on.
        masks: Name -> bool [N, T], True = valid; None: all.
        held_out_masks: Name -> bool [N', T], True = valid; None: all.
    """
    codes, information, most = [], [], -1
    for L in SIZES:
        centres = first_codes(features, L, masks)
        indices = {name: nearest_code(x, centres) for name, x in held_out.items()}
        if held_out_masks is not None:
            indices = {m: torch.where(held_out_masks[m], i, -1) for m, i in indices.items()}
        if (used := len(torch.stack([*indices.values()]).unique())) > most:
            most = used
            codes.append(centres)
            information.append(held_out_information(indices, L))
    return codes[largest(information)]


def largest(information: Sequence[float]) -> int:
    """The last position at which I is about the highest; 0 where it is about 0 at all of them."""
    best = max(information)
    if not best > _TOLERANCE:  # NaN of a single clip included
        return 0
    return max(k for k, value in enumerate(information) if value >= best - _TOLERANCE)


def first_codes(
    features: Mapping[str, Tensor],
    codebook_size: int,
    masks: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Centres [L, D] of k-means on the means over the modalities that are valid."""
    z = torch.stack([*features.values()])
    if masks is None:
        mean = z.mean(0).flatten(0, 1)
    else:
        valid = torch.stack([masks[name] for name in features])[..., None]
        count = valid.sum(0)
        mean = (torch.where(valid, z, 0).sum(0) / count.clamp(min=1))[count.squeeze(-1) > 0]
    return kmeans(mean, codebook_size)


def held_out_information(indices: Mapping[str, Tensor], codebook_size: int) -> float:
    """I in nats, the mean over the directions: indices int64 [N, T], -1 where not valid."""
    pairs = [*permutations(indices, 2)]
    return sum(_information(indices[a], indices[b], codebook_size) for a, b in pairs) / len(pairs)


def _information(a: Tensor, b: Tensor, L: int) -> float:
    """I of one direction, the mean of both halves, with the best of the priors."""
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(0))
    halves = order[: len(a) // 2], order[len(a) // 2 :]  # a file may be in the order of the classes
    found = torch.zeros(len(_PRIORS), dtype=torch.double)
    for seen, held in (halves, halves[::-1]):
        joint = torch.zeros(L, L, dtype=torch.double)
        i, j = _both_valid(a[seen], b[seen])
        joint.index_put_((i, j), torch.ones(len(i), dtype=torch.double), accumulate=True)
        marginal = (joint.sum(0) + 1 / L) / (joint.sum() + 1)  # P(b)
        i, j = _both_valid(a[held], b[held])
        if not len(i):
            return 0.0
        for k, prior in enumerate(_PRIORS):
            conditional = (joint + prior * marginal) / (joint.sum(1, keepdim=True) + prior)
            found[k] += (conditional[i, j] / marginal[j]).log().mean() / 2
    return float(found.max())


def _both_valid(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The codes [n] of the segments that are valid in both modalities."""
    both = (a >= 0) & (b >= 0)
    return a[both].cpu(), b[both].cpu()
