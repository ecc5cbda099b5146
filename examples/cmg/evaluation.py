"""Evaluate cross-modal generalisation: train on labels of one modality, test on another.

The encoders are frozen. A head is trained on the quantized vectors of one modality of the labelled
clips (split 1) and tested once on every modality of the held-out clips (split 2). The upper bound
of "a->b" is the same head trained and tested on b. A second classifier, `TokenNaiveBayes`, sees
nothing but the indices of the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mmvq.functional import code_agreement

from .clips import BACKGROUND, TEST, TRAIN, Clips
from .containers import Rows
from .heads import Head, Heads, TokenNaiveBayes, over_time

Score = Callable[[Tensor, Tensor], dict[str, float]]  # of predicted and true classes
Classifier = Callable[[Tensor], Tensor]  # of inputs; gives classes
C = TypeVar("C", bound=Classifier)
Fit = Callable[[Tensor, Tensor], C]  # of inputs and labels
Scores = dict[str, dict[str, float]]  # "source->target" -> name of a score -> value
Pairs = Mapping[tuple[str, str], dict[str, float]]  # (source, target) -> name -> value
CLIP_BOUNDS = {"upper_bound": "accuracy"}  # name of an upper bound -> the score it is of
SEGMENT_BOUNDS = {"upper_bound": "segment_f1", "upper_bound_accuracy": "segment_accuracy"}


class Labelled(NamedTuple):
    """Clips to train a classifier on, or to test it on.

    Attributes:
        inputs: Name -> what the classifier sees of each clip, [n, ...].
        labels: Name -> classes, int64 [n] or [n, T]; those below 0 are not used, and neither are
            modalities without labels.
    """

    inputs: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]

    def rows(self, chosen: Tensor) -> Labelled:
        """The clips with these indices."""
        return Labelled(
            {name: x[chosen] for name, x in self.inputs.items()},
            {name: y[chosen] for name, y in self.labels.items()},
        )


def clip_scores(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """Accuracy, and as chance the accuracy of the best constant guess (the most common class).

    Clips whose true class is below 0 do not count, here and in `segment_scores`.
    """
    predicted, truth = predicted[truth >= 0], truth[truth >= 0]
    return {
        "accuracy": (predicted == truth).double().mean().item(),
        "chance": truth.bincount().max().item() / len(truth),
    }


def segment_scores(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """Micro precision, recall and F1 of event segments, and accuracy over all segments.

    A hit is a segment with an event for which that event is predicted. Precision is hits over
    segments predicted as events, recall is hits over segments with events. Predicting background
    everywhere has F1 = 0. Accuracy counts background as one more class. "chance" and "chance_f1"
    are the best accuracy and F1 of a constant guess.

    Args:
        predicted: int64 [N, T], 0 = background.
        truth: int64 [N, T], 0 = background, below 0 = not valid.
    """
    predicted, truth = predicted[truth >= 0], truth[truth >= 0]
    hits = ((truth > 0) & (predicted == truth)).sum().item()
    counts = truth.flatten().bincount(minlength=2).double()
    events, claims = (truth > 0).sum().item(), (predicted > 0).sum().item()
    return {
        "segment_f1": 2 * hits / max(events + claims, 1),
        "precision": hits / max(claims, 1),
        "recall": hits / max(events, 1),
        "segment_accuracy": (predicted == truth).double().mean().item(),
        "chance": (counts.max() / truth.numel()).item(),
        "chance_f1": (2 * counts[1:].amax() / (events + truth.numel())).item(),
    }


def fit_heads(codes: Mapping[str, Rows], clips: Clips) -> Heads:
    """Train the heads of each modality on split 1.

    Args:
        codes: Name -> quantized vectors [N, T, D] of all N clips, with one D for all.
        clips: The clips; if they have no labels, there are no heads.
    """
    if not clips.labelled:
        return Heads({}, {})
    rows = clips.rows(TRAIN)
    of_clips, of_segments = _clips(codes, clips), _segments(codes, clips)
    return Heads(*(fitted(data.rows(rows), Head.fit) for data in (of_clips, of_segments)))


def evaluate(
    codes: Mapping[str, Rows],
    indices: Mapping[str, Tensor],
    clips: Clips,
    codebook_size: int,
    heads: Heads | None = None,
) -> dict[str, Scores]:
    """Evaluate every direction of transfer, and how far codes are shared, for metrics.json.

    Args:
        codes: Name -> quantized vectors [N, T, D] of all N clips, with one D for all. Only those of
            splits 1 and 2 are used.
        indices: Name -> their codes, int64 [N, T], -1 where not valid.
        clips: Clips with splits. Labels of split 0 are not used.
        codebook_size: Number of codes L.
        heads: The heads to test; None: those of `fit_heads`.

    Returns:
        The results of `classification` and `localization`, each with "token_accuracy" (of
        `TokenNaiveBayes`), and of `agreement`, by name. Without labels, the first two are empty.
    """
    rows = clips.test_rows()
    held_out = {name: i[rows] for name, i in indices.items()}
    shown = {name: y[rows] for name, y in clips.segment_labels.items()}
    alike = agreement(held_out, shown)
    if not clips.labelled:
        return {"classification": {}, "localization": {}, "agreement": alike}
    heads = fit_heads(codes, clips) if heads is None else heads
    of_clips = classification(codes, clips, heads.clips)
    of_segments = localization(codes, clips, heads.segments)
    table = partial(TokenNaiveBayes, codebook_size=codebook_size)
    for found, labels, score, name in (
        (of_clips, {m: clips.labels_of(m) for m in indices}, clip_scores, "accuracy"),
        (of_segments, segment_classes(clips), segment_scores, "segment_accuracy"),
    ):
        data = _labelled(indices, labels)
        tokens = transfer(data.rows(clips.rows(TRAIN)), data.rows(rows), table, score)
        for way, scores in directions(tokens, {}).items():
            found[way]["token_accuracy"] = scores[name]
    return {"classification": of_clips, "localization": of_segments, "agreement": alike}


def classification(
    codes: Mapping[str, Rows], clips: Clips, heads: Mapping[str, Head] | None = None
) -> Scores:
    """Classify clips: {"a->b": {"accuracy", "chance", "upper_bound"}}; heads as in `evaluate`."""
    return directions(_scores(_clips(codes, clips), clips, heads, clip_scores), CLIP_BOUNDS)


def localization(
    codes: Mapping[str, Rows], clips: Clips, heads: Mapping[str, Head] | None = None
) -> Scores:
    """Classify segments: the fields of `segment_scores`, and two upper bounds.

    "upper_bound" is that of segment_f1, "upper_bound_accuracy" that of segment_accuracy. The result
    is empty if the clips have no segment labels. Heads are as in `evaluate`.
    """
    scores = _scores(_segments(codes, clips), clips, heads, segment_scores)
    return directions(scores, SEGMENT_BOUNDS)


def _scores(data: Labelled, clips: Clips, heads: Mapping[str, Head] | None, score: Score) -> Pairs:
    """Scores on split 2 of these heads, or of heads trained on split 1."""
    found = fitted(data.rows(clips.rows(TRAIN)), Head.fit) if heads is None else heads
    return tested(found, data.rows(clips.rows(TEST)), score)


def _clips(codes: Mapping[str, Rows], clips: Clips) -> Labelled:
    described = {name: _OverTime(x, clips.masks.get(name)) for name, x in codes.items()}
    return _labelled(described, {name: clips.labels_of(name) for name in codes})


def _segments(codes: Mapping[str, Rows], clips: Clips) -> Labelled:
    return _labelled(codes, segment_classes(clips))


def _labelled(inputs: Mapping[str, Any], labels: Mapping[str, Tensor]) -> Labelled:
    """The inputs, which are read when indexed with clips, that have labels."""
    both = [name for name in labels if name in inputs]
    return Labelled({m: inputs[m] for m in both}, {m: labels[m] for m in both})


@dataclass(frozen=True)
class _OverTime:
    """`over_time` of the clips that it is indexed with."""

    codes: Rows
    valid: Tensor | None

    def __getitem__(self, rows: Any) -> Tensor:
        return over_time(self.codes[rows], None if self.valid is None else self.valid[rows])


def agreement(indices: Mapping[str, Tensor], shown: Mapping[str, Tensor]) -> Scores:
    """How often two modalities that show the same event have the same code.

    Args:
        indices: Name -> int64 [N, T], -1 for padding.
        shown: Name -> events int64 [N, T], BACKGROUND for none. Of a pair without these, every
            segment counts.

    Returns:
        {"a->b": {"share", "chance"}}, equal to "b->a". "chance" is the share if both chose their
        codes independently, with the frequencies that they have in these segments.
    """
    scores: Scores = {}
    for a, b in permutations(indices, 2):
        pair = {name: indices[name] for name in (a, b)}
        if a in shown and b in shown:
            same = (shown[a] == shown[b]) & (shown[a] != BACKGROUND)
            pair = {name: torch.where(same, i, -1) for name, i in pair.items()}
        both = (pair[a] >= 0) & (pair[b] >= 0)
        size = 1 + max(int(i.max()) for i in indices.values())
        counts = [i[both].bincount(minlength=size).double() for i in pair.values()]
        total = max(int(both.sum()), 1)
        scores[f"{a}->{b}"] = {
            "share": float(code_agreement(pair).share[a, b].nan_to_num()),
            "chance": float(counts[0] @ counts[1]) / total**2,
        }
    return scores


def segment_classes(clips: Clips) -> dict[str, Tensor]:
    """Name -> int64 [N, T], the classes of segments for heads: 0 = background, -1 = not valid."""
    return {
        name: torch.where(clips.valid(name), x - BACKGROUND, -1)
        for name, x in clips.segment_labels.items()
    }


def transfer(train: Labelled, test: Labelled, fit: Fit[Any], score: Score) -> Pairs:
    """Train a classifier on each modality and test it on each: scores of every (source, target).

    Args:
        train: Clips to train on, one classifier for each modality.
        test: Clips to test all classifiers on, of the same data set or another.
        fit: Trains a classifier, such as `Head.fit` or `TokenNaiveBayes`.
        score: Computes scores from predicted and true labels.
    """
    return tested(fitted(train, fit), test, score)


def fitted(train: Labelled, fit: Fit[C]) -> dict[str, C]:
    """A classifier for each modality with labels."""
    return {name: fit(train.inputs[name], labels) for name, labels in train.labels.items()}


def tested(classifiers: Mapping[str, Classifier], test: Labelled, score: Score) -> Pairs:
    """Scores of every classifier on every modality with labels."""
    return {
        (source, target): score(predict(test.inputs[target]), truth)
        for source, predict in classifiers.items()
        for target, truth in test.labels.items()
    }


def directions(scores: Pairs, bounds: Mapping[str, str]) -> Scores:
    """Name the directions "source->target" and add their upper bounds.

    Args:
        scores: (source, target) -> scores, also for source = target.
        bounds: Name of an upper bound -> name of the score whose value at (target, target) it is.
    """
    return {
        f"{a}->{b}": own | {bound: scores[b, b][score] for bound, score in bounds.items()}
        for (a, b), own in scores.items()
        if a != b
    }
