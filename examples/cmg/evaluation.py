"""Cross-modal generalisation, measured: labels of one modality, tests on another.

The encoders are frozen. A head sees the quantized vectors of one modality (never indices), learns
from its labelled clips (split 1), and is tested on every modality of held-out clips (split 2),
once, after its last step. One head per source serves all its targets; the upper bound of "a->b" is
the same head trained on b's labels and tested on b.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .data import BACKGROUND, TEST, TRAIN, Clips

Scores = dict[str, dict[str, float]]  # "source->target" -> name of a score -> its value
Pairs = Mapping[tuple[str, str], dict[str, float]]  # (source, target) -> the same


class Labelled(NamedTuple):
    """Clips that a head learns from, or is tested on.

    Attributes:
        codes: Name -> quantized vectors [n, T, D].
        labels: Name -> classes, int64 [n] or [n, T]; or, where several at once may be true, float
            [n, T, K] of 0 and 1. Modalities without labels take no part.
    """

    codes: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]

    def rows(self, chosen: Tensor) -> Labelled:
        """These clips only."""
        return Labelled(
            {name: x[chosen] for name, x in self.codes.items()},
            {name: y[chosen] for name, y in self.labels.items()},
        )


class Scale(nn.Module):
    """Centres the codes and makes their mean variance 1: no head depends on their scale.

    Args:
        codes: [..., D], what to measure on.
    """

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        x = codes.flatten(0, -2)  # [n, D]
        self.mean = nn.Buffer(x.mean(0))
        self.deviation = nn.Buffer(x.var(0, correction=0).mean().sqrt().clamp(min=1e-12))

    def forward(self, codes: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return (codes - self.mean) / self.deviation


class ClipHead(nn.Module):
    """Event of a clip: Linear(D, D), maximum over time, Linear(D, classes)."""

    def __init__(self, D: int, num_classes: int) -> None:
        super().__init__()
        self.segment = nn.Linear(D, D)
        self.classify = nn.Linear(D, num_classes)

    def forward(self, codes: Tensor) -> Tensor:
        """Map [N, T, D] to logits [N, classes]."""
        return self.classify(self.segment(codes).amax(dim=1))


def fit_head(head: nn.Module, codes: Tensor, labels: Tensor, *, steps: int = 100) -> nn.Sequential:
    """Train a head on frozen codes: Adam with cosine decay, 256 clips a step.

    The loss is cross-entropy, or binary cross-entropy of each class where several may be true.

    The L2 penalty is inversely proportional to the number of classes, as the gradient it opposes
    is: a head that leans on every detail of the source transfers worse.

    Args:
        head: Maps codes to logits [..., classes].
        codes: [N, T, D], any scale.
        labels: int64 [N] or [N, T], as the head's logits ask for, or float like the logits.
        steps: Optimiser steps; the head after the last one is returned, none is picked.
    """
    model = nn.Sequential(Scale(codes), head)
    penalty = 0.2 / model(codes[:1]).shape[-1]

    def loss(batch: Tensor) -> Tensor:
        batch = batch.to(codes.device)
        logits, truth = model(codes[batch]).flatten(0, -2), labels[batch]
        if truth.is_floating_point():
            return nn.functional.binary_cross_entropy_with_logits(logits, truth.view_as(logits))
        return nn.functional.cross_entropy(logits, truth.flatten())

    descend(model, loss, len(codes), steps=steps, learning_rate=3e-2, weight_decay=penalty)
    return model


def descend(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    examples: int,
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    batch_size: int = 256,
) -> None:
    """Minimise by Adam with cosine decay.

    Args:
        model: What to train, in place.
        loss: Of the indices [batch_size] of examples, drawn with replacement.
        examples: How many there are.
        steps: Of the optimiser.
        learning_rate: The first.
        weight_decay: An L2 penalty.
        batch_size: Examples a step.
    """
    optimizer = torch.optim.Adam(model.parameters(), learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        value = loss(torch.randint(examples, (batch_size,)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()


def clip_scores(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """Accuracy, and chance: the accuracy of the best constant guess (the commonest class)."""
    return {
        "accuracy": (predicted == truth).double().mean().item(),
        "chance": truth.bincount().max().item() / len(truth),
    }


def segment_scores(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """Micro precision, recall and F1 of event segments, and accuracy over all segments.

    A segment is a hit where an event is predicted and that same event is there. Precision divides
    the hits by the segments predicted as events, recall by those that are events; predicting
    background everywhere has F1 = 0. Accuracy counts background as one more class. Chance is the
    best that a constant guess reaches, in accuracy and, as chance_f1, in F1.

    Args:
        predicted: int64 [N, T], 0 = background.
        truth: int64 [N, T], 0 = background.
    """
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


def evaluate(codes: Mapping[str, Tensor], clips: Clips, seed: int) -> dict[str, Scores]:
    """Every direction of transfer, as the two blocks of metrics.json.

    Args:
        codes: Name -> quantized vectors [N, T, D] of all N clips, one D for all.
        clips: Where labels and splits come from. Labels of split 0 are not used.
        seed: Of the heads' initial weights and batches; the global random state stays as it was.

    Returns:
        "classification" and "localization", as the functions of these names give them.
    """
    return {
        "classification": classification(codes, clips, seed),
        "localization": localization(codes, clips, seed),
    }


def classification(codes: Mapping[str, Tensor], clips: Clips, seed: int) -> Scores:
    """The class of a clip: {"a->b": {"accuracy", "chance", "upper_bound"}}."""
    data = Labelled(codes, dict.fromkeys(codes, clips.labels))
    train, test = data.rows(clips.rows(TRAIN)), data.rows(clips.rows(TEST))
    scores = transfer(train, test, ClipHead, clip_scores, clips.num_classes, seed)
    return directions(scores, {"upper_bound": "accuracy"})


def localization(codes: Mapping[str, Tensor], clips: Clips, seed: int) -> Scores:
    """The class of a segment, linearly: the fields of `segment_scores`, and two upper bounds.

    "upper_bound" bounds segment_f1, "upper_bound_accuracy" segment_accuracy. Empty where the clips
    have no segment labels.
    """
    truth = {name: y for name, y in segment_classes(clips).items() if name in codes}
    data = Labelled(codes, truth)
    train, test = data.rows(clips.rows(TRAIN)), data.rows(clips.rows(TEST))
    scores = transfer(train, test, nn.Linear, segment_scores, clips.num_classes + 1, seed)
    return directions(
        scores, {"upper_bound": "segment_f1", "upper_bound_accuracy": "segment_accuracy"}
    )


def event_localization(
    codes: Mapping[str, Tensor], events: Mapping[str, Tensor], clips: Clips, seed: int
) -> Scores:
    """Localisation where a segment may show several events, as in AVVP.

    The same linear head, but every event by itself: binary cross-entropy, and present from a
    probability of 0.5 on.

    Args:
        codes: Name -> quantized vectors [N, T, D].
        events: Name -> [N, T, K], 1 where the modality shows the event, else 0.
        clips: Where the splits come from.
        seed: As in `evaluate`.

    Returns:
        {"a->b": the fields of `event_scores`, and "upper_bound" of segment_f1}.
    """
    data = Labelled(codes, {name: x.float() for name, x in events.items()})
    train, test = data.rows(clips.rows(TRAIN)), data.rows(clips.rows(TEST))
    K = next(iter(events.values())).shape[-1]
    scores = transfer(train, test, nn.Linear, event_scores, K, seed)
    return directions(scores, {"upper_bound": "segment_f1"})


def event_scores(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """Micro precision, recall and F1 of events in segments, and the best F1 of a constant guess.

    Args:
        predicted: bool [N, T, K].
        truth: [N, T, K] of 0 and 1.
    """
    there = truth > 0
    hits, claims, events = (x.sum().item() for x in (predicted & there, predicted, there))
    # A constant guess is a set of events: the k commonest, for the best k.
    found = there.flatten(0, -2).sum(0).sort(descending=True).values.cumsum(0).double()
    claimed = torch.arange(1, len(found) + 1) * (truth.numel() // truth.shape[-1])
    return {
        "segment_f1": 2 * hits / max(events + claims, 1),
        "precision": hits / max(claims, 1),
        "recall": hits / max(events, 1),
        "chance_f1": (2 * found / (events + claimed)).max().item(),
    }


def segment_classes(clips: Clips) -> dict[str, Tensor]:
    """Name -> int64 [N, T], classes of segments as heads count them: 0 = background."""
    return {name: x - BACKGROUND for name, x in clips.segment_labels.items()}


def transfer(
    train: Labelled,
    test: Labelled,
    make_head: Callable[[int, int], nn.Module],
    score: Callable[[Tensor, Tensor], dict[str, float]],
    num_classes: int,
    seed: int,
) -> dict[tuple[str, str], dict[str, float]]:
    """Scores of every (source, target), the same modality twice included.

    Args:
        train: What the heads learn from, one head per modality.
        test: What every head is tested on; the same data set or another.
        make_head: Of (D, num_classes).
        score: Of predicted and true labels.
        num_classes: Of both sets.
        seed: Of the heads' initial weights and batches; the global random state stays as it was.
    """
    scores: dict[tuple[str, str], dict[str, float]] = {}
    with torch.random.fork_rng(devices=[]):
        for source, labels in train.labels.items():
            torch.manual_seed(seed)
            x = train.codes[source].detach().float()  # [n, T, D]
            head = make_head(x.shape[-1], num_classes).to(x.device)
            model = fit_head(head, x, labels.to(x.device))
            for target, truth in test.labels.items():
                with torch.no_grad():
                    logits = model(test.codes[target].float()).cpu()
                several = truth.is_floating_point()
                scores[source, target] = score(logits > 0 if several else logits.argmax(-1), truth)
    return scores


def directions(scores: Pairs, bounds: Mapping[str, str]) -> Scores:
    """Name the directions "source->target" and add their upper bounds.

    Args:
        scores: (source, target) -> scores, the same modality twice included.
        bounds: Name of a bound -> the score of (target, target) that it is.
    """
    return {
        f"{a}->{b}": own | {bound: scores[b, b][score] for bound, score in bounds.items()}
        for (a, b), own in scores.items()
        if a != b
    }
