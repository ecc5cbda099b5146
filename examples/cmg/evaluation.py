"""Evaluate cross-modal generalisation: train on labels of one modality, test on another.

The encoders are frozen. A head is trained on the quantized vectors (not the indices) of one
modality of the labelled clips (split 1). After its last step it is tested once on every modality of
the held-out clips (split 2). The upper bound of "a->b" is the same head trained and tested on b.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .data import BACKGROUND, TEST, TRAIN, Clips

Scores = dict[str, dict[str, float]]  # "source->target" -> name of a score -> value
Pairs = Mapping[tuple[str, str], dict[str, float]]  # (source, target) -> name -> value
CLIP_BOUNDS = {"upper_bound": "accuracy"}  # name of an upper bound -> the score it is of
SEGMENT_BOUNDS = {"upper_bound": "segment_f1", "upper_bound_accuracy": "segment_accuracy"}


class Labelled(NamedTuple):
    """Clips to train a head on, or to test it on.

    Attributes:
        codes: Name -> quantized vectors [n, T, D].
        labels: Name -> classes, int64 [n] or [n, T]. Modalities without labels are not used.
    """

    codes: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]

    def rows(self, chosen: Tensor) -> Labelled:
        """The clips with these indices."""
        return Labelled(
            {name: x[chosen] for name, x in self.codes.items()},
            {name: y[chosen] for name, y in self.labels.items()},
        )


class Scale(nn.Module):
    """Centre codes and scale them to a mean variance of 1, so that heads do not depend on scale.

    Args:
        codes: Vectors [..., D] to measure mean and variance on.
    """

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        x = rearrange(codes, "... d -> (...) d")
        self.mean = nn.Buffer(x.mean(0))
        self.deviation = nn.Buffer(x.var(0, correction=0).mean().sqrt().clamp(min=1e-12))

    def forward(self, codes: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return (codes - self.mean) / self.deviation


class ClipHead(nn.Module):
    """Classify a clip: Linear(D, D), maximum over time, Linear(D, classes)."""

    def __init__(self, D: int, num_classes: int) -> None:
        super().__init__()
        self.segment = nn.Linear(D, D)
        self.classify = nn.Linear(D, num_classes)

    def forward(self, codes: Tensor) -> Tensor:
        """Map [N, T, D] to logits [N, classes]."""
        return self.classify(self.segment(codes).amax(dim=1))


def fit_head(head: nn.Module, codes: Tensor, labels: Tensor, *, steps: int = 100) -> nn.Sequential:
    """Train a head on frozen codes.

    The L2 penalty keeps the head from fitting details of the source modality, which would transfer
    worse. It is inversely proportional to the number of classes, as the gradient is.

    Args:
        head: Module from codes to logits [..., classes].
        codes: Vectors [N, T, D] of any scale.
        labels: int64 [N] or [N, T], with the leading dimensions of the logits.
        steps: Number of optimizer steps. The head after the last step is returned.
    """
    model = nn.Sequential(Scale(codes), head)
    penalty = 0.2 / model(codes[:1]).shape[-1]

    def loss(batch: Tensor) -> Tensor:
        batch = batch.to(codes.device)
        logits = rearrange(model(codes[batch]), "... k -> (...) k")
        return nn.functional.cross_entropy(logits, labels[batch].flatten())

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
    """Minimize a loss with Adam and cosine decay.

    Args:
        model: Module to train, in place.
        loss: Loss of a batch, given the indices [batch_size] of examples drawn with replacement.
        examples: Number of examples.
        steps: Number of optimizer steps.
        learning_rate: Learning rate of the first step.
        weight_decay: Weight of the L2 penalty.
        batch_size: Examples in a batch.
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
    """Accuracy, and as chance the accuracy of the best constant guess (the most common class)."""
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
    """Evaluate every direction of transfer, for metrics.json.

    Args:
        codes: Name -> quantized vectors [N, T, D] of all N clips, with one D for all.
        clips: Clips with labels and splits. Labels of split 0 are not used.
        seed: Seed of the heads' weights and batches. The global random state is unchanged.

    Returns:
        The results of the functions `classification` and `localization`, by name.
    """
    return {
        "classification": classification(codes, clips, seed),
        "localization": localization(codes, clips, seed),
    }


def classification(codes: Mapping[str, Tensor], clips: Clips, seed: int) -> Scores:
    """Classify clips: {"a->b": {"accuracy", "chance", "upper_bound"}}."""
    data = Labelled(codes, dict.fromkeys(codes, clips.labels))
    train, test = data.rows(clips.rows(TRAIN)), data.rows(clips.rows(TEST))
    scores = transfer(train, test, ClipHead, clip_scores, clips.num_classes, seed)
    return directions(scores, CLIP_BOUNDS)


def localization(codes: Mapping[str, Tensor], clips: Clips, seed: int) -> Scores:
    """Classify segments with a linear head: the fields of `segment_scores`, and two upper bounds.

    "upper_bound" is that of segment_f1, "upper_bound_accuracy" that of segment_accuracy. The result
    is empty if the clips have no segment labels.
    """
    truth = {name: y for name, y in segment_classes(clips).items() if name in codes}
    data = Labelled(codes, truth)
    train, test = data.rows(clips.rows(TRAIN)), data.rows(clips.rows(TEST))
    scores = transfer(train, test, nn.Linear, segment_scores, clips.num_classes + 1, seed)
    return directions(scores, SEGMENT_BOUNDS)


def segment_classes(clips: Clips) -> dict[str, Tensor]:
    """Name -> int64 [N, T], the classes of segments for heads: 0 = background."""
    return {name: x - BACKGROUND for name, x in clips.segment_labels.items()}


def transfer(
    train: Labelled,
    test: Labelled,
    make_head: Callable[[int, int], nn.Module],
    score: Callable[[Tensor, Tensor], dict[str, float]],
    num_classes: int,
    seed: int,
) -> dict[tuple[str, str], dict[str, float]]:
    """Train a head on each modality and test it on each: scores of every (source, target).

    Args:
        train: Clips to train the heads on, one head for each modality.
        test: Clips to test all heads on, of the same data set or another.
        make_head: Builds a head, given (D, num_classes).
        score: Computes scores from predicted and true labels.
        num_classes: Number of classes of both sets.
        seed: Seed of the heads, see `evaluate`.
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
                    predicted = model(test.codes[target].float()).argmax(-1).cpu()
                scores[source, target] = score(predicted, truth)
    return scores


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
