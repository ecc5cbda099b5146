"""Query-based segmentation: the pixels of the number that audio or text names (Table 4, Fig. 5).

Frames have two numbers, of which the query names one. The query is the frozen code of the segment
in one modality. The head is trained with the codes of one modality and tested with those of
another. Its other input are the standardised cells of the frame, without the video encoder of the
run. Only segments with a named number are used.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from cmg import digits
from cmg.clips import TEST, TRAIN
from cmg.data import load_clips
from cmg.errors import DataError
from cmg.evaluation import Scores, directions
from cmg.run import TrainedRun
from cmg.standardize import Standardizer

from ..descent import Scale, descend
from .masks import mask_scores


class Frames(NamedTuple):
    """Frames in which a number is named.

    Attributes:
        cells: Standardised cells [n, 7, 7, C].
        queries: Name -> codes [n, D].
        masks: bool [n, 56, 56], the pixels of the number.
        classes: int64 [n], the class of the number.
        pictures: uint8 [n, 56, 56], to draw.
    """

    cells: Tensor
    queries: dict[str, Tensor]
    masks: Tensor
    classes: Tensor
    pictures: Tensor


class MaskHead(nn.Module):
    """Predict the logits of a mask from cells, multiplied by the query.

    Args:
        query: Codes [n, D], to measure their scale on.
        channels: Channels of a cell.
        cell: Side of a cell in pixels.
        width: Hidden width.
    """

    def __init__(self, query: Tensor, channels: int, cell: int, width: int = 64) -> None:
        super().__init__()
        self.look = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.GELU())
        self.ask = nn.Sequential(Scale(query), nn.Linear(query.shape[-1], width))
        self.draw = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, cell * cell, 1),
            nn.PixelShuffle(cell),
        )

    def forward(self, cells: Tensor, query: Tensor) -> Tensor:
        """Map cells [n, 7, 7, C] and queries [n, D] to logits [n, 56, 56]."""
        seen = self.look(rearrange(cells, "n h w c -> n c h w"))  # [n, W, 7, 7]
        return self.draw(seen * self.ask(query)[..., None, None]).squeeze(1)


def segment(run: TrainedRun) -> Scores:
    """The fields of `query_scores` on scenes of two numbers, with queries of audio and text.

    Raises:
        DataError: The run does not have both audio and text.
    """
    train, test = scenes(run)
    return query_scores(train, test, run.seed)


def query_scores(train: Frames, test: Frames, seed: int, *, steps: int = 200) -> Scores:
    """MIoU and F-score of every pair of query modalities.

    Returns:
        {"a->b": scores of queries b, trained with queries a: "miou" and "f_score"; "upper_bound"
        and "upper_bound_f_score", trained with b; "chance" and "chance_f_score" of a head without
        a query; "class" and "class_f_score" of a head with the true class as the query}.
    """
    found = {a: fit_mask_head(train, q, seed, steps=steps) for a, q in train.queries.items()}
    scores = {
        (a, b): mask_scores(masks(head, test.cells, q), test.masks)
        for a, head in found.items()
        for b, q in test.queries.items()
    }
    limits: dict[str, float] = {}
    classes = torch.cat([train.classes, test.classes])
    for name, query in {
        "chance": torch.zeros(len(classes), 1),
        "class": nn.functional.one_hot(classes).float(),
    }.items():
        learned, held = query.split([len(train.cells), len(test.cells)])
        head = fit_mask_head(train, learned, seed, steps=steps)
        limit = mask_scores(masks(head, test.cells, held), test.masks)
        limits |= {name: limit["miou"], f"{name}_f_score": limit["f_score"]}
    ways = directions(scores, {"upper_bound": "miou", "upper_bound_f_score": "f_score"})
    return {way: own | limits for way, own in ways.items()}


def scenes(run: TrainedRun, path: str | Path | None = None) -> tuple[Frames, Frames]:
    """Frames to train on, and frames to test on.

    Args:
        run: A run of audio and text, whose codes are the queries.
        path: A file of `digits.load_scenes`. None is that of seed 0.
    """
    names = [name for name in run.config.shapes if name in ("audio", "text")]
    if len(names) < 2:
        raise DataError(
            "segmentation: needs a run of audio and text, to query with one and then the other; "
            f"got {' '.join(run.config.shapes)}."
        )
    path = digits.load_scenes() if path is None else path
    clips = load_clips(path, [*names, "video"])
    codes, _ = run.quantize({name: clips.features[name] for name in names})
    video = clips.only(["video"])
    cells = Standardizer.fit(video).transform(video)["video"]
    with np.load(path, allow_pickle=False) as file:
        drawn, pictures = (torch.from_numpy(file[key]) for key in ("masks", "frames"))

    def part(split: int) -> Frames:
        named = (clips.split[:, None] == split) & (clips.segment_labels["video"] >= 0)  # [N, T]
        return Frames(
            cells[named],
            {name: codes[name][named] for name in names},
            drawn[named],
            clips.segment_labels["video"][named],
            pictures[named],
        )

    return part(TRAIN), part(TEST)


def fit_mask_head(train: Frames, query: Tensor, seed: int, *, steps: int = 200) -> MaskHead:
    """Train a head with queries [n, D]; the global random state is unchanged."""

    def loss(batch: Tensor) -> Tensor:
        logits, truth = head(train.cells[batch], query[batch]), train.masks[batch].float()
        return nn.functional.binary_cross_entropy_with_logits(logits, truth)

    cell = train.masks.shape[-1] // train.cells.shape[-2]  # side in pixels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = MaskHead(query, train.cells.shape[-1], cell)
        descend(
            head,
            loss,
            len(query),
            steps=steps,
            learning_rate=3e-3,
            weight_decay=1e-4,
            batch_size=64,
        )
    return head


@torch.no_grad()
def masks(head: MaskHead, cells: Tensor, query: Tensor) -> Tensor:
    """Predict the probabilities of masks, [n, 56, 56]."""
    return torch.cat(
        [head(c, q).sigmoid() for c, q in zip(cells.split(256), query.split(256), strict=True)]
    )
