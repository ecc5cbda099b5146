"""Retrieval of audio: train with queries of one modality, test with another (Table 5).

Queries are frozen codes. The gallery is standardised raw features of audio. One tower for the
queries and one for the gallery are trained together on the pairs of split 1. In the test, the
queries are of another modality: text in place of video, or the reverse. In the paper, the run is
trained on video and text only. A run that is also trained on audio follows the same protocol,
because its audio encoder is not used.

The paper gives the two stages and R@5 and R@10, but no architecture, gallery or loss. Here both
towers map every segment to a vector, the similarity of two clips is the cosine of their
concatenated segments, the loss is InfoNCE over the batch, and the gallery is split 2.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from cmg import retrieval
from cmg.clips import TEST, TRAIN
from cmg.errors import DataError
from cmg.evaluation import Scores, directions
from cmg.run import TrainedRun
from cmg.standardize import Standardizer
from mmvq.functional import info_nce

from ..descent import Scale, descend

RANKS = (5, 10)


class Towers(nn.Module):
    """Map queries and gallery to one space.

    Args:
        query: Codes [n, T, D], to measure their scale on.
        channels: Channels of a segment of the gallery.
        width: Dimension of a segment in the common space.
    """

    def __init__(self, query: Tensor, channels: int, width: int = 16) -> None:
        super().__init__()
        self.query = nn.Sequential(Scale(query), nn.Linear(query.shape[-1], width), nn.Flatten())
        self.gallery = nn.Sequential(
            nn.Dropout(0.3),
            nn.Linear(channels, 64),
            nn.GELU(),
            nn.Dropout(0.3),
            nn.Linear(64, width),
            nn.Flatten(),
        )

    def loss(self, query: Tensor, gallery: Tensor) -> Tensor:
        """Symmetric InfoNCE of a batch."""
        return info_nce(
            self.query(query),
            self.gallery(gallery),
            temperature=0.1,
            normalize=True,
            symmetric=True,
        )

    @torch.no_grad()
    def similarity(self, query: Tensor, gallery: Tensor) -> Tensor:
        """Cosines [n, m] of queries and gallery."""
        q, g = self.query(query), self.gallery(gallery)
        return nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(g, dim=-1).T


def retrieve(run: TrainedRun, gallery: str = "audio") -> Scores:
    """R@5 and R@10 of every pair of query modalities.

    Args:
        run: A run of two modalities or more besides the gallery, whose clips also have the gallery.
        gallery: Modality to retrieve.

    Returns:
        {"a->b": scores of queries b, trained with queries a: "r5" and "r10", "chance_*" k/n, and
        "upper_bound_*", trained with b}.

    Raises:
        DataError: The clips lack the gallery, or the run has too few other modalities.
    """
    queries = {name: x for name, x in run.codes[0].items() if name != gallery}
    if gallery not in run.clips.features or len(queries) < 2:
        raise DataError(
            f"retrieval: needs clips with {gallery} and two other modalities in the run; got "
            f"clips of {' '.join(run.clips.features)} and a run of {' '.join(run.config.shapes)}."
        )
    only = run.clips.only([gallery])
    items = Standardizer.fit(only).transform(only)[gallery]
    items = rearrange(items, "n t ... -> n t (...)")
    train, test = run.clips.rows(TRAIN), run.clips.rows(TEST)
    scores: dict[tuple[str, str], dict[str, float]] = {}
    with torch.random.fork_rng(devices=[]):
        for a, codes in queries.items():
            torch.manual_seed(run.seed)
            towers = Towers(codes[train], items.shape[-1])

            def loss(batch: Tensor, towers: Towers = towers, codes: Tensor = codes) -> Tensor:
                return towers.loss(codes[train[batch]], items[train[batch]])

            descend(towers, loss, len(train), steps=200, learning_rate=3e-3, weight_decay=1e-4)
            towers.eval()
            for b, held in queries.items():
                scores[a, b] = recall(towers.similarity(held[test], items[test]))
    bounds = {f"upper_bound_{name}": name for name in (f"r{k}" for k in RANKS)}
    return directions(scores, bounds)


def recall(similarity: Tensor) -> dict[str, float]:
    """R@k: the share of queries with their own item among the k most similar; ties are misses.

    Args:
        similarity: Similarities [n, n]; query i belongs to item i.

    Returns:
        "r5", "r10", and "chance_r5", "chance_r10" of k random items.
    """
    own, n = retrieval.ranks(similarity), len(similarity)
    found = {f"r{k}": retrieval.recall(own, k) for k in RANKS}
    return found | {f"chance_r{k}": min(k / n, 1.0) for k in RANKS}
