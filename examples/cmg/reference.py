"""A linear baseline on the same clips: canonical correlation analysis (CCA).

Multi-set CCA on the time-aligned segments of split 0 finds, without labels, linear maps of all
modalities into one space in which they correlate most. The mapped vectors replace the codes in the
heads of `evaluation`, and in logistic regression.

The hyperparameters (pooling of video cells, ridge, width) are chosen on split 1, separately for
clips and for segments. The criterion is a ridge classifier trained on one half of a modality's
labelled clips and tested on the other half in another modality, averaged over all directions. This
favours the baseline, because it uses labels of all modalities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from .clips import BACKGROUND, PRETRAIN, TEST, TRAIN, Clips
from .errors import DataError
from .evaluation import (
    CLIP_BOUNDS,
    SEGMENT_BOUNDS,
    Scores,
    classification,
    clip_scores,
    directions,
    localization,
    segment_scores,
)
from .standardize import Standardizer

Array = NDArray[Any]
Views = dict[str, Array]  # name -> [N, T, D]

_RIDGES = (0.003, 0.01, 0.03, 0.1)
_WIDTHS = (8, 12, 16, 24, 32)
_COMPONENTS = 256  # principal components of segments, the input of CCA
_CELL_COMPONENTS = 64  # principal components of a cell, if cells are denoised before pooling


def cca_reference(clips: Clips) -> dict[str, Any]:
    """Evaluate linear CCA in every direction.

    Args:
        clips: Clips of two modalities or more, with raw features, all valid.

    Returns:
        "classification" and "localization" as in `evaluation.evaluate`, "logistic_regression" with
        the same two, and "settings" with the hyperparameters chosen for each.
    """
    check_reference(clips)
    train = clips.rows(TRAIN).numpy()
    labels = dict.fromkeys(clips.features, clips.labels.numpy())
    segments = {name: (x - BACKGROUND).numpy() for name, x in clips.segment_labels.items()}
    clip, segment = _Choice(), _Choice()
    for settings, views in _candidates(clips):
        clip.offer(_ridge_transfer(_over_time(views), labels, train), settings, views)
        segment.offer(_ridge_transfer(views, segments, train), settings, views)
    return {
        "classification": classification(_tensors(clip.views), clips),
        "localization": localization(_tensors(segment.views), clips),
        "logistic_regression": {
            "classification": _logistic(
                _over_time(clip.views), labels, clips, clip_scores, CLIP_BOUNDS
            ),
            "localization": _logistic(
                segment.views, segments, clips, segment_scores, SEGMENT_BOUNDS
            ),
        },
        "settings": {"classification": clip.settings, "localization": segment.settings},
    }


def check_reference(clips: Clips) -> None:
    """Check that CCA can be measured on these clips.

    Raises:
        DataError: They have masks, or no labels.
    """
    if not clips.labelled:
        raise DataError("--reference cca: takes clips with labels; got none.")
    if clips.masks:
        raise DataError(
            f"--reference cca: takes clips without masks; got masks of {', '.join(clips.masks)}."
        )


class _Choice:
    """The best candidate so far, the first one on ties."""

    def __init__(self) -> None:
        self.score = -1.0
        self.settings: dict[str, Any] = {}
        self.views: Views = {}

    def offer(self, score: float, settings: dict[str, Any], views: Views) -> None:
        if score > self.score:
            self.score, self.settings, self.views = score, settings, views


def _candidates(clips: Clips) -> Iterator[tuple[dict[str, Any], Views]]:
    """Yield all hyperparameters, each with the CCA vectors of all clips."""
    rows = clips.rows(PRETRAIN).numpy()
    grids = any(len(x.shape) > 3 for x in clips.features.values())
    for cell_components in (None, _CELL_COMPONENTS) if grids else (None,):
        pooled = pool_cells(clips, cell_components)
        x = {name: _principal(features, rows) for name, features in pooled.items()}
        for ridge in _RIDGES:
            maps = multiset_cca({name: v[rows] for name, v in x.items()}, ridge)
            for width in _WIDTHS:
                settings = {"cell_components": cell_components, "ridge": ridge, "width": width}
                yield settings, {name: x[name] @ U[:, :width] for name, U in maps.items()}


def multiset_cca(views: Mapping[str, Array], ridge: float) -> Views:
    """Linear maps under which all views correlate most.

    Solves (C - B) u = rho B u, where C is the covariance of the concatenated views and B has its
    diagonal blocks plus the ridge. For two views this is regularised CCA.

    Args:
        views: Name -> [..., D_m], centred, with the same leading dimensions.
        ridge: Number added to every variance.

    Returns:
        Name -> [D_m, sum of all D_m], the best direction first.
    """
    flat = {name: _rows(x) for name, x in views.items()}
    joint = np.concatenate(list(flat.values()), axis=1)
    C = joint.T @ joint / len(joint)
    owner = np.repeat(np.arange(len(flat)), [x.shape[1] for x in flat.values()])
    within = owner[:, None] == owner[None, :]
    root = np.linalg.inv(np.linalg.cholesky(np.where(within, C, 0) + ridge * np.eye(len(C))))
    _, vectors = np.linalg.eigh(root @ np.where(within, 0, C) @ root.T)
    U = root.T @ vectors[:, ::-1]
    return {name: U[owner == m] for m, name in enumerate(flat)}


def pool_cells(clips: Clips, components: int | None = None) -> dict[str, Tensor]:
    """Pool grids by the maximum and the mean of their cells, [N, T, 2 C]; vectors are unchanged.

    With `components`, cells are first projected onto that many principal axes and back. This
    removes noise, which the maximum would pick.
    """
    pooled: dict[str, Tensor] = {}
    standardizer = None if components is None else Standardizer.fit(clips, width=components)
    for name, features in clips.features.items():
        N, T, *grid, C = features.shape
        if not grid:
            pooled[name] = clips.read(name, torch.arange(N))
            continue
        pooled[name] = torch.empty(N, T, 2 * C)
        for n, out in enumerate(pooled[name]):
            x = rearrange(clips.read(name, torch.tensor([n])), "1 t ... c -> t (...) c").float()
            if standardizer is not None:
                x = standardizer.denoise(name, x)
            out[:] = torch.cat([x.amax(1), x.mean(1)], dim=-1)
    return pooled


def _principal(features: Tensor, rows: Array) -> Array:
    """Standardise features and project them on their principal axes, all measured on `rows`."""
    x = features.double().numpy()
    seen = _rows(x[rows])
    deviation = seen.std(0)
    deviation[deviation == 0] = 1.0
    x = (x - seen.mean(0)) / deviation
    seen = _rows(x[rows])
    _, vectors = np.linalg.eigh(seen.T @ seen / len(seen))
    return x @ vectors[:, ::-1][:, :_COMPONENTS]


def _ridge_transfer(x: Views, y: Mapping[str, Array], train: Array, ridge: float = 0.1) -> float:
    """Mean accuracy of a ridge classifier from one half of `train` to the other, all directions.

    Args:
        x: Name -> vectors [N, ..., D].
        y: Name -> classes [N, ...]; modalities without classes are not used.
        train: Indices of the clips.
        ridge: Ridge in units of the mean variance of x.
    """
    scores: list[float] = []
    for seen, held in ((train[::2], train[1::2]), (train[1::2], train[::2])):
        for a in y:
            rows = _rows(x[a][seen])
            mean = rows.mean(0)
            rows = rows - mean
            C = rows.T @ rows / len(rows)
            C += ridge * max(C.trace() / len(C), 1e-12) * np.eye(len(C))
            shown, columns = np.unique(y[a][seen], return_inverse=True)
            classes = np.eye(len(shown))[columns.ravel()]
            W = np.linalg.solve(C, rows.T @ (classes - classes.mean(0)) / len(rows))
            for b in y:
                if a != b:
                    guess = shown[((x[b][held] - mean) @ W + classes.mean(0)).argmax(-1)]
                    scores.append(float((guess == y[b][held]).mean()))
    return float(np.mean(scores)) if scores else 0.0


def _logistic(
    x: Views,
    y: Mapping[str, Array],
    clips: Clips,
    score: Callable[[Tensor, Tensor], dict[str, float]],
    bounds: Mapping[str, str],
) -> Scores:
    """Logistic regression from every modality to every other, scored as in `evaluation`."""
    train, test = clips.rows(TRAIN).numpy(), clips.rows(TEST).numpy()
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for a in y:
        rows = _rows(x[a][train])
        scale = rows.std() or 1.0
        model = LogisticRegression(max_iter=2000).fit(rows / scale, y[a][train].ravel())
        for b in y:
            guess = model.predict(_rows(x[b][test]) / scale)
            truth = torch.from_numpy(y[b][test])
            scores[a, b] = score(torch.from_numpy(guess).reshape(truth.shape), truth)
    return directions(scores, bounds)


def _rows(x: Array) -> Array:
    return rearrange(x, "... d -> (...) d")


def _over_time(views: Views) -> Views:
    return {name: x.mean(1) for name, x in views.items()}  # [N, T, D] -> [N, D]


def _tensors(views: Views) -> dict[str, Tensor]:
    return {name: torch.from_numpy(x) for name, x in views.items()}
