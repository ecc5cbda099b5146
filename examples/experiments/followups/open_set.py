"""Open-set generalisation: name known classes in another modality, and reject unknown ones.

The task of "Open-set Cross Modal Generalization via Multimodal Unified Representation" (Huang et
al., ICCV 2025). A head is trained on the known classes in one modality. In another modality it must
classify clips of known classes and reject clips of unknown classes.

A clip is rejected if the highest probability of the head is below a threshold. The threshold is
chosen on held-out training clips of the source modality, such that a given share of them is
accepted. No clip of an unknown class and no test clip is used for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmg.clips import TEST, TRAIN
from cmg.evaluation import Scores, directions
from cmg.heads import Head, over_time
from cmg.run import TrainedRun

UNKNOWN = -1


def score_open_set(run: TrainedRun, known: float = 0.6, accept: float = 0.9) -> Scores:
    """H-score of every direction.

    Args:
        run: The run. Its pre-training uses clips of all classes, without labels.
        known: Share of the classes that are known; they are drawn with the seed of the run.
        accept: Share of held-out training clips to accept.

    Returns:
        {"a->b": the fields of `open_scores`, and "upper_bound", the h_score from b to b}.
    """
    clips, codes = run.clips, run.codes[0]
    generator = torch.Generator().manual_seed(run.seed)
    K = round(known * clips.num_classes)
    classes = torch.randperm(clips.num_classes, generator=generator)[:K].sort().values
    truth = renumber(clips.labels, classes)
    train = clips.rows(TRAIN)
    train = train[truth[train] != UNKNOWN]
    held_out, learned = train[::4], train[torch.arange(len(train)) % 4 != 0]
    test = clips.rows(TEST)
    scores: dict[tuple[str, str], dict[str, float]] = {}
    described = {name: over_time(x) for name, x in codes.items()}
    for a, x in described.items():
        head = Head.fit(x[learned], truth[learned])
        confidence, _ = _answer(head, x[held_out])
        threshold = confidence.quantile(1 - accept)
        for b, there in described.items():
            confidence, answer = _answer(head, there[test])
            answer[confidence < threshold] = UNKNOWN
            scores[a, b] = open_scores(answer, truth[test])
    return directions(scores, {"upper_bound": "h_score"})


def renumber(labels: Tensor, classes: Tensor) -> Tensor:
    """Labels as indices into `classes` (ascending); UNKNOWN for all other labels."""
    place = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)
    return torch.where(classes[place] == labels, place, UNKNOWN)


def open_scores(answer: Tensor, truth: Tensor) -> dict[str, float]:
    """H = 2 k u / (k + u), k the accuracy on known clips, u the share of unknown clips rejected.

    Chance is the highest H of a guess independent of the clip. It accepts a clip with probability p
    and predicts the most common class, a share c of the known clips. Then k = p c and u = 1 - p,
    and the best p gives H = 2 c / (1 + sqrt c)^2.

    Args:
        answer: Predictions, int64 [n]; UNKNOWN = rejected.
        truth: Labels, int64 [n]; UNKNOWN = not a known class.

    Returns:
        "known", "unknown", "h_score" and "chance".
    """
    known = truth != UNKNOWN
    k = (answer[known] == truth[known]).double().mean().item()
    u = (answer[~known] == UNKNOWN).double().mean().item()
    c = (truth[known].bincount().max() / known.sum()).item()
    return {
        "known": k,
        "unknown": u,
        "h_score": 2 * k * u / (k + u) if k + u else 0.0,
        "chance": 2 * c / (1 + c**0.5) ** 2,
    }


def _answer(head: Head, x: Tensor) -> tuple[Tensor, Tensor]:
    """The highest probability and its class, both [n]."""
    confidence, place = head.probabilities(x).max(-1)
    return confidence, head.classes[place]
