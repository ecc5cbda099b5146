"""Classifiers of codes: logistic regression on their vectors, naive Bayes on their indices."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """Multinomial logistic regression on frozen codes.

    Codes are centred and scaled to a mean variance of 1, so that their scale does not matter. The
    L2 penalty keeps the head from fitting details of the source modality, which would transfer
    worse. Every clip has the same weight against it, however many segments it has.

    Attributes:
        mean: float64 [F], mean of the inputs.
        scale: float64 [], root of their mean variance.
        weight: float64 [K, F].
        bias: float64 [K].
        classes: int64 [K], the classes that the head knows, ascending.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    classes: Tensor

    @classmethod
    def fit(cls, x: Tensor, labels: Tensor, C: float = 0.1, iterations: int = 300) -> Head:
        """Train a head with scikit-learn.

        Args:
            x: Vectors [n, F], or [n, T, F] to classify segments.
            labels: int64 [n] or [n, T]; those below 0 are not used.
            C: Weight of a clip's log-likelihood, relative to the penalty.
            iterations: Most steps of L-BFGS.
        """
        used = labels >= 0
        clips = used.flatten(1).any(1).sum().item() if used.ndim > 1 else used.sum().item()
        rows, labels = x.detach()[used].double(), labels[used]
        mean = rows.mean(0)
        scale = rows.var(0, correction=0).mean().sqrt().clamp(min=1e-12)
        classes = labels.unique()
        weight, bias = rows.new_zeros(len(classes), rows.shape[1]), rows.new_zeros(len(classes))
        if len(classes) > 1:  # otherwise there is nothing to tell apart
            model = LogisticRegression(C=C * clips / len(rows), max_iter=iterations)
            with warnings.catch_warnings():  # that the last step was taken is no news
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(((rows - mean) / scale).numpy(), labels.numpy())
            # of two classes, scikit-learn keeps the row of the second
            weight[-len(model.coef_) :] = torch.from_numpy(model.coef_)
            bias[-len(model.coef_) :] = torch.from_numpy(model.intercept_)
        return cls(mean, scale, weight, bias, classes)

    def __call__(self, x: Tensor) -> Tensor:
        """Predict the classes of [..., F]: int64 [...]."""
        return self.classes[self._scores(x).argmax(-1)]

    def probabilities(self, x: Tensor) -> Tensor:
        """Probabilities of the `classes` of [..., F]: float64 [..., K]."""
        return self._scores(x).softmax(-1)

    def _scores(self, x: Tensor) -> Tensor:
        return (x.detach().double() - self.mean) / self.scale @ self.weight.T + self.bias


class Heads(NamedTuple):
    """The heads of a run: name of the modality whose labels it is trained on -> head.

    Attributes:
        clips: Of `over_time` of a clip's codes.
        segments: Of the code of a segment; class 0 is background. Empty without segment labels.
    """

    clips: dict[str, Head]
    segments: dict[str, Head]


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
