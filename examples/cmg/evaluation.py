"""Evaluate cross-modal generalisation: train on labels of one modality, test on another.

The encoders are frozen. A head is trained on the quantized vectors of one modality of the labelled
clips (split 1) and tested once on every modality of the held-out clips (split 2). The upper bound
of "a->b" is the same head trained and tested on b. A second classifier, `TokenNaiveBayes`, sees
nothing but the indices of the codes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from itertools import permutations
from typing import Any, NamedTuple

import torch
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mmvq.functional import code_agreement

from .clips import BACKGROUND, TEST, TRAIN, Clips
from .containers import Rows

Score = Callable[[Tensor, Tensor], dict[str, float]]  # of predicted and true classes
Fit = Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]  # inputs, labels -> inputs -> classes
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


class Head:
    """Multinomial logistic regression on frozen codes.

    Codes are centred and scaled to a mean variance of 1, so that their scale does not matter. The
    L2 penalty keeps the head from fitting details of the source modality, which would transfer
    worse. Every clip has the same weight against it, however many segments it has.

    Args:
        x: Vectors [n, D], or [n, T, D] to classify segments.
        labels: int64 [n] or [n, T]; those below 0 are not used.
        weight: Weight of a clip's log-likelihood; sklearn's C.
        iterations: Most steps of L-BFGS.
    """

    def __init__(
        self, x: Tensor, labels: Tensor, weight: float = 0.1, iterations: int = 300
    ) -> None:
        used = labels >= 0
        clips = used.flatten(1).any(1).sum().item() if used.ndim > 1 else used.sum().item()
        rows, labels = x.detach()[used].double(), labels[used]
        self.mean = rows.mean(0)
        self.deviation = rows.var(0, correction=0).mean().sqrt().clamp(min=1e-12)
        model = LogisticRegression(C=weight * clips / len(rows), max_iter=iterations)
        if len(labels.unique()) == 1:  # nothing to tell apart
            model = DummyClassifier()
        with warnings.catch_warnings():  # that the last step was taken is no news
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.model = model.fit(self._scaled(rows), labels.numpy())

    def __call__(self, x: Tensor) -> Tensor:
        """Predict the classes of [..., D]: int64 [...]."""
        rows = x.detach().double().flatten(0, -2)
        return torch.from_numpy(self.model.predict(self._scaled(rows))).view(x.shape[:-1])

    def probabilities(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The classes [K] that the head knows, ascending, and their probabilities [n, K]."""
        shares = self.model.predict_proba(self._scaled(x.detach().double()))
        return torch.from_numpy(self.model.classes_), torch.from_numpy(shares)

    def _scaled(self, rows: Tensor) -> Any:
        return ((rows - self.mean) / self.deviation).numpy()


def over_time(codes: Tensor, valid: Tensor | None = None) -> Tensor:
    """Describe a clip by mean and maximum over its segments: [N, T, D] -> [N, 2 D].

    Args:
        codes: Vectors [N, T, D].
        valid: bool [N, T], segments to use; None: all. A clip without any gets zeros.
    """
    if valid is None or valid.all():
        return torch.cat([codes.mean(1), codes.amax(1)], -1)
    use, count = valid[..., None], valid.sum(1)[:, None]
    mean = codes.where(use, 0).sum(1) / count.clamp(min=1)
    return torch.cat([mean, codes.where(use, -torch.inf).amax(1).where(count > 0, 0)], -1)


class Codes:
    """Quantized vectors [N, T, D] of code indices, made when indexed with clips.

    Args:
        indices: int64 [N, T]; -1 gives zeros.
        codebook: Codes [L, D].
    """

    def __init__(self, indices: Tensor, codebook: Tensor) -> None:
        self.indices, self.codebook = indices, codebook.detach().cpu()
        self.shape = (*indices.shape, codebook.shape[1])

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """Vectors [n, T, D] of the clips with these indices."""
        chosen = self.indices[rows]
        return self.codebook[chosen.clamp(min=0)].where(chosen[..., None] >= 0, 0)


class TokenNaiveBayes:
    r"""A naive Bayes classifier on code indices alone: the log-probability of each code by class.

    $$\hat c = \mathrm{argmax}_c\, \ln m_c + \sum_t \ln P(l_t | c), \quad
      P(l | c) = \frac{n_{cl} + s\, p_l}{n_c + s}, \quad p_l = \frac{n_l + 1}{n + L}$$

    n_cl counts the segments of class c with code l, and m_c the clips (or segments) of class c. The
    smoothing s draws rare classes and codes to the frequency p of the code in all classes.

    Args:
        indices: int64 [n, T], -1 where not valid.
        labels: Classes, int64 [n] (of the whole clip) or [n, T]; those below 0 are not used.
        codebook_size: Number of codes L.
    """

    smoothing = 10.0

    def __init__(self, indices: Tensor, labels: Tensor, codebook_size: int) -> None:
        num_classes = 1 + int(labels.max())
        counts = torch.zeros(num_classes, codebook_size, dtype=torch.double)
        each = labels if labels.ndim > 1 else labels[:, None].expand_as(indices)
        used = (each >= 0) & (indices >= 0)
        ones = torch.ones(int(used.sum()), dtype=torch.double)
        counts.index_put_((each[used], indices[used]), ones, accumulate=True)
        frequency = (counts.sum(0) + 1) / (counts.sum() + codebook_size)
        total = counts.sum(1, keepdim=True)
        self.table = (counts + self.smoothing * frequency).log() - (total + self.smoothing).log()
        self.prior = labels[labels >= 0].bincount(minlength=num_classes).double().log()
        self.clips = labels.ndim == 1

    def __call__(self, indices: Tensor) -> Tensor:
        """Predict classes of [N, T]: int64 [N] by the sum over segments, or [N, T]."""
        scores = self.table[:, indices.clamp(min=0)].where(indices >= 0, 0)  # [classes, N, T]
        if self.clips:
            scores = scores.sum(-1)
        return (self.prior.view(-1, *[1] * (scores.ndim - 1)) + scores).argmax(0)


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


def evaluate(
    codes: Mapping[str, Rows], indices: Mapping[str, Tensor], clips: Clips, codebook_size: int
) -> dict[str, Scores]:
    """Evaluate every direction of transfer, and how far codes are shared, for metrics.json.

    Args:
        codes: Name -> quantized vectors [N, T, D] of all N clips, with one D for all. Only those of
            splits 1 and 2 are used.
        indices: Name -> their codes, int64 [N, T], -1 where not valid.
        clips: Clips with labels and splits. Labels of split 0 are not used.
        codebook_size: Number of codes L.

    Returns:
        The results of `classification` and `localization`, each with "token_accuracy" (of
        `TokenNaiveBayes`), and of `agreement`, by name.
    """
    table = partial(TokenNaiveBayes, codebook_size=codebook_size)
    of_clips, of_segments = classification(codes, clips), localization(codes, clips)
    labels = {name: clips.labels_of(name) for name in indices}
    tokens = _tested(indices, labels, clips, table, clip_scores)
    for way, found in directions(tokens, {}).items():
        of_clips[way]["token_accuracy"] = found["accuracy"]
    tokens = _tested(indices, segment_classes(clips), clips, table, segment_scores)
    for way, found in directions(tokens, {}).items():
        of_segments[way]["token_accuracy"] = found["segment_accuracy"]
    held_out = {name: i[clips.rows(TEST)] for name, i in indices.items()}
    shown = {name: y[clips.rows(TEST)] for name, y in clips.segment_labels.items()}
    return {
        "classification": of_clips,
        "localization": of_segments,
        "agreement": agreement(held_out, shown),
    }


def classification(codes: Mapping[str, Rows], clips: Clips) -> Scores:
    """Classify clips: {"a->b": {"accuracy", "chance", "upper_bound"}}."""
    described = {name: _OverTime(x, clips.masks.get(name)) for name, x in codes.items()}
    labels = {name: clips.labels_of(name) for name in codes}
    return directions(_tested(described, labels, clips, Head, clip_scores), CLIP_BOUNDS)


class _OverTime(NamedTuple):
    """`over_time` of the clips that it is indexed with."""

    codes: Rows
    valid: Tensor | None

    def __getitem__(self, rows: Any) -> Tensor:
        return over_time(self.codes[rows], None if self.valid is None else self.valid[rows])


def localization(codes: Mapping[str, Rows], clips: Clips) -> Scores:
    """Classify segments: the fields of `segment_scores`, and two upper bounds.

    "upper_bound" is that of segment_f1, "upper_bound_accuracy" that of segment_accuracy. The result
    is empty if the clips have no segment labels.
    """
    labels = segment_classes(clips)
    return directions(_tested(codes, labels, clips, Head, segment_scores), SEGMENT_BOUNDS)


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


def transfer(train: Labelled, test: Labelled, fit: Fit, score: Score) -> Pairs:
    """Train a classifier on each modality and test it on each: scores of every (source, target).

    Args:
        train: Clips to train on, one classifier for each modality.
        test: Clips to test all classifiers on, of the same data set or another.
        fit: Trains a classifier, such as `Head` or `TokenNaiveBayes`.
        score: Computes scores from predicted and true labels.
    """
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for source, labels in train.labels.items():
        predict = fit(train.inputs[source], labels)
        for target, truth in test.labels.items():
            scores[source, target] = score(predict(test.inputs[target]), truth)
    return scores


def _tested(
    inputs: Mapping[str, Any], labels: Mapping[str, Tensor], clips: Clips, fit: Fit, score: Score
) -> Pairs:
    """`transfer` from split 1 to split 2; the inputs are read when indexed with clips."""
    data = Labelled(inputs, {name: y for name, y in labels.items() if name in inputs})
    return transfer(data.rows(clips.rows(TRAIN)), data.rows(clips.rows(TEST)), fit, score)


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
