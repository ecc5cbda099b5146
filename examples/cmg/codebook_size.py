"""Choose the number of codes from clips without labels.

With few codes, modalities agree on them, but a code says little about its segment. With many, each
modality chooses among near-equal codes by what only it sees, so that modalities agree less. In
between, the mutual information of the codes of two modalities at the same segment is highest. It is
measured on clips that the encoders are not trained on: half of them estimates P(b | a), the
distribution of the code of one modality given that of another, and the other half measures

    I = mean over segments of ln P(b | a) / P(b)    [nats]

a held-out estimate of the mutual information, which is usually too low. It falls where there are
too many codes for the data. The weight of the prior of P(b | a) is the best of a few. The size is

    L = the largest of 12, 24, 48, ... 384 with I(L) >= 0.95 max I,

since more codes tell more of their own modality where I is about the highest. Which codes k-means
finds depends on the order of the clips and on rounding, which move I by some hundredths of a nat.
So that they seldom decide L, I is the mean over a few starts of k-means, each with its own halves,
and sizes are far apart: past its flat maximum, I mostly falls by much more from L to 2 L.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations

import torch
from torch import Tensor

from mmvq.functional import kmeans, nearest_code

SIZES = (12, 24, 48, 96, 192, 384)
_STARTS = 4  # of k-means, for the mean of I
_SHARE = 0.95  # of the highest I
_NOTHING = 0.01  # nats that can be sampling error
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
    vectors = _means(features, masks)
    sizes, information, most = [], [], -1
    for L in SIZES:
        used, found = 0, 0.0
        for start in range(_STARTS):
            order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(start))
            centres = kmeans(vectors[order], L)  # the order decides its start
            indices = {name: nearest_code(x, centres) for name, x in held_out.items()}
            if held_out_masks is not None:
                indices = {m: torch.where(held_out_masks[m], i, -1) for m, i in indices.items()}
            used += len(torch.stack([*indices.values()]).unique())
            found += held_out_information(indices, L, start) / _STARTS
        if used > most:
            most = used
            sizes.append(L)
            information.append(found)
    return first_codes(features, sizes[largest(information)], masks)


def largest(information: Sequence[float]) -> int:
    """The last position at which I is about the highest; 0 where it is about 0 at all of them."""
    best = max(information)
    if not best > _NOTHING:  # NaN of a single clip included
        return 0
    return max(k for k, value in enumerate(information) if value >= _SHARE * best)


def first_codes(
    features: Mapping[str, Tensor],
    codebook_size: int,
    masks: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Centres [L, D] of k-means on the means over the modalities that are valid."""
    return kmeans(_means(features, masks), codebook_size)


def _means(features: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None) -> Tensor:
    """Means [n, D] over the modalities that are valid, of the segments with one or more."""
    z = torch.stack([*features.values()])
    if masks is None:
        return z.mean(0).flatten(0, 1)
    valid = torch.stack([masks[name] for name in features])[..., None]
    count = valid.sum(0)
    return (torch.where(valid, z, 0).sum(0) / count.clamp(min=1))[count.squeeze(-1) > 0]


def held_out_information(indices: Mapping[str, Tensor], codebook_size: int, seed: int = 0) -> float:
    """I in nats, the mean over the directions.

    Args:
        indices: Name -> int64 [N, T], -1 where not valid.
        codebook_size: Number of codes L.
        seed: Of the halves.
    """
    pairs = [(indices[a], indices[b]) for a, b in permutations(indices, 2)]
    return sum(_information(a, b, codebook_size, seed) for a, b in pairs) / len(pairs)


def _information(a: Tensor, b: Tensor, L: int, seed: int) -> float:
    """I of one direction, the mean of both halves, with the best of the priors."""
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(seed))
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
