"""Cross-modal generalisation, measured: labels of one modality, tests on another.

The encoders are frozen. A head sees the quantized vectors of one modality (never indices), learns
from its labelled clips (split 1), and is tested on every modality of held-out clips (split 2),
once, after its last step. One head per source serves all its targets; the upper bound of "a->b" is
the same head trained on b's labels and tested on b.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .data import BACKGROUND, TEST, TRAIN, Clips

Scores = dict[str, dict[str, float]]  # "source->target" -> name of a score -> its value


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
    """Train a head on frozen codes: cross-entropy, Adam with cosine decay, 256 clips a step.

    The L2 penalty is inversely proportional to the number of classes, as the gradient it opposes
    is: a head that leans on every detail of the source transfers worse.

    Args:
        head: Maps codes to logits [..., classes].
        codes: [N, T, D], any scale.
        labels: int64 [N] or [N, T], as the head's logits ask for.
        steps: Optimiser steps; the head after the last one is returned, none is picked.
    """
    model = nn.Sequential(Scale(codes), head)
    penalty = 0.2 / model(codes[:1]).shape[-1]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2, weight_decay=penalty)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(len(codes), (256,)).to(codes.device)
        logits = model(codes[batch]).flatten(0, -2)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels[batch].flatten()).backward()
        optimizer.step()
        schedule.step()
    return model


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
    background everywhere has F1 = 0. Accuracy counts background as one more class, and chance is
    the accuracy of the best constant guess.

    Args:
        predicted: int64 [N, T], 0 = background.
        truth: int64 [N, T], 0 = background.
    """
    hits = ((truth > 0) & (predicted == truth)).sum().item()
    events, claims = (truth > 0).sum().item(), (predicted > 0).sum().item()
    return {
        "segment_f1": 2 * hits / max(events + claims, 1),
        "precision": hits / max(claims, 1),
        "recall": hits / max(events, 1),
        "segment_accuracy": (predicted == truth).double().mean().item(),
        "chance": truth.flatten().bincount().max().item() / truth.numel(),
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
    truth = dict.fromkeys(codes, clips.labels)
    scores = _transfer(codes, truth, clips, ClipHead, clip_scores, clips.num_classes, seed)
    return directions(scores, {"upper_bound": "accuracy"})


def localization(codes: Mapping[str, Tensor], clips: Clips, seed: int) -> Scores:
    """The class of a segment, linearly: the fields of `segment_scores`, and two upper bounds.

    "upper_bound" bounds segment_f1, "upper_bound_accuracy" segment_accuracy. Empty where the clips
    have no segment labels.
    """
    truth = {name: x - BACKGROUND for name, x in clips.segment_labels.items()}  # background is 0
    classes = clips.num_classes + 1
    scores = _transfer(codes, truth, clips, nn.Linear, segment_scores, classes, seed)
    return directions(
        scores, {"upper_bound": "segment_f1", "upper_bound_accuracy": "segment_accuracy"}
    )


def _transfer(
    codes: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    clips: Clips,
    make_head: Callable[[int, int], nn.Module],
    score: Callable[[Tensor, Tensor], dict[str, float]],
    num_classes: int,
    seed: int,
) -> dict[tuple[str, str], dict[str, float]]:
    """Scores of every (source, target), the same modality twice included."""
    train, test = clips.rows(TRAIN), clips.rows(TEST)
    scores: dict[tuple[str, str], dict[str, float]] = {}
    with torch.random.fork_rng(devices=[]):
        for source, labels in truth.items():
            torch.manual_seed(seed)
            x = codes[source].detach().float()  # [N, T, D]
            head = make_head(x.shape[-1], num_classes).to(x.device)
            model = fit_head(head, x[train], labels[train].to(x.device))
            for target, there in truth.items():
                with torch.no_grad():
                    logits = model(codes[target][test].float())
                scores[source, target] = score(logits.argmax(-1).cpu(), there[test])
    return scores


def directions(
    scores: Mapping[tuple[str, str], dict[str, float]], bounds: Mapping[str, str]
) -> Scores:
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
