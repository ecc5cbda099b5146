"""Take a run apart: what encoders, quantization, crossing and head lose, in each direction.

The same logistic regression is trained on raw features, on semantic features z and on codes, for
clips (mean and maximum over time) and for segments. Accuracy of "a->b" is that of labels of a,
tested on b:

    encoder       z of b, less raw features of b     (labels of b)
    quantization  codes of b, less z of b            (labels of b)
    crossing      codes, labels of a, less labels of b
    head          codes, labels of a: the head of the run, less a weaker penalty of sklearn
    tokens        `TokenNaiveBayes`, less the head

Raw features of grids are the mean and maximum over their cells. To choose settings, measure by
cross-validation on split 1, and leave split 2 for the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from .clips import PRETRAIN, TEST, TRAIN, Clips
from .errors import DataError
from .evaluation import Fit, Labelled, clip_scores, segment_classes, transfer
from .heads import Head, TokenNaiveBayes, over_time
from .reference import pool_cells

Tensors = Mapping[str, Tensor]
FOLDS = 3
STAGES = ("raw", "z", "codes", "z across", "codes across", "weak penalty", "tokens across")


def diagnose(
    clips: Clips,
    features: Tensors,
    codes: Tensors,
    indices: Tensors,
    codebook_size: int,
    *,
    test: bool = False,
) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy of every stage of STAGES and every loss, in every direction.

    Args:
        clips: Clips with raw features.
        features: Name -> semantic features z [N, T, D].
        codes: Name -> quantized vectors [N, T, D].
        indices: Name -> their codes, int64 [N, T], -1 where not valid.
        codebook_size: Number of codes L.
        test: Whether to train on split 1 and test on split 2. False: cross-validation on split 1.

    Returns:
        {"clips" and, with segment labels, "segments": {"a->b": {stage or loss: value}}}.

    Raises:
        DataError: Split 1 has too few clips for cross-validation.
    """
    raw = _raw(clips)
    labels = {name: clips.labels_of(name) for name in codes}
    splits = _splits(clips, test)
    table = partial(TokenNaiveBayes, codebook_size=codebook_size)

    def stages(
        labels: Tensors, describe: Callable[[Tensor, Tensor], Tensor]
    ) -> dict[str, dict[str, float]]:
        def score(
            inputs: Tensors, fit: Fit[Any], *, across: bool = True
        ) -> dict[tuple[str, str], float]:
            groups = [[*labels]] if across else [[name] for name in labels]
            found: dict[tuple[str, str], float] = {}
            for names in groups:
                found |= _accuracy({m: inputs[m] for m in names}, labels, splits, fit)
            return found

        z, quantized, bare = (
            {m: describe(x[m], clips.valid(m)) for m in labels} for x in (features, codes, raw)
        )
        of_raw = score(bare, partial(Head.fit, iterations=100), across=False)
        of_z, of_codes = score(z, Head.fit), score(quantized, Head.fit)
        weak, tokens = score(quantized, partial(Head.fit, C=1.0)), score(indices, table)
        result = {}
        for a, b in permutations(labels, 2):
            values = of_raw[b, b], of_z[b, b], of_codes[b, b], of_z[a, b], of_codes[a, b]
            found = dict(zip(STAGES, (*values, weak[a, b], tokens[a, b]), strict=True))
            result[f"{a}->{b}"] = found | {
                "encoder": found["z"] - found["raw"],
                "quantization": found["codes"] - found["z"],
                "crossing": found["codes across"] - found["codes"],
                "head": found["codes across"] - found["weak penalty"],
                "tokens": found["tokens across"] - found["codes across"],
            }
        return result

    result = {"clips": stages(labels, over_time)}
    segments = {m: y for m, y in segment_classes(clips).items() if m in codes}
    if len(segments) > 1:
        result["segments"] = stages(segments, lambda x, valid: x)
    return result


def diagnosis_table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A block for clips and one for segments: a line for each direction, and the mean."""
    blocks = []
    for title, ways in found.items():
        columns = list(next(iter(ways.values())))
        mean = {c: sum(way[c] for way in ways.values()) / len(ways) for c in columns}
        first = max(len(title), *map(len, ways))
        lines = [f"{title:<{first}}" + "".join(f"  {c:>7}" for c in columns)]
        for name, way in (*ways.items(), ("mean", mean)):
            cells = (f"{way[c]:+.3f}" if c not in STAGES else f"{way[c]:.3f}" for c in columns)
            widths = (max(7, len(c)) for c in columns)
            cells = (f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
            lines.append(f"{name:<{first}}" + "".join(cells))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _raw(clips: Clips) -> dict[str, Tensor]:
    """Raw features [N, T, C], or [N, T, 2 C] of grids, standardised on splits 0 and 1."""
    rows = clips.rows(PRETRAIN, TRAIN)
    raw: dict[str, Tensor] = {}
    for name, x in pool_cells(clips).items():
        seen = x[rows].float()[clips.valid(name, rows)]
        deviation, mean = torch.std_mean(seen, dim=0, correction=0)
        raw[name] = (x - mean) / deviation.clamp(min=1e-6)
    return raw


def _splits(clips: Clips, test: bool) -> list[tuple[Tensor, Tensor]]:
    """Rows to train on and to test on, once for each fold."""
    rows = clips.rows(TRAIN)
    if test:
        return [(rows, clips.rows(TEST))]
    fold = torch.empty(len(rows), dtype=torch.long)
    order = clips.labels[rows].argsort(stable=True)
    fold[order] = torch.arange(len(rows)) % FOLDS  # every class in every fold
    folds = [(rows[fold != k], rows[fold == k]) for k in range(FOLDS) if (fold == k).any()]
    for name in clips.modalities:
        labels = clips.labels_of(name)
        known = [(labels[seen].unique() >= 0).sum() for seen, _ in folds]
        if len(folds) < 2 or min(known) < 2 or not all((labels[x] >= 0).any() for _, x in folds):
            rule = f"split 1 has too few clips of {name} for cross-validation"
            raise DataError(f"{rule}. Hint: --test.")
    return folds


def _accuracy(
    inputs: Tensors, labels: Tensors, splits: list[tuple[Tensor, Tensor]], fit: Fit[Any]
) -> dict[tuple[str, str], float]:
    """Accuracy of every (source, target), the mean of the folds."""
    data = Labelled(inputs, {name: labels[name] for name in inputs})
    found: dict[tuple[str, str], list[float]] = {}
    for train, held in splits:
        scores = transfer(
            data.rows(train),
            data.rows(held),
            fit,
            lambda predicted, truth: {"": clip_scores(predicted, truth)["accuracy"]},
        )
        for way, score in scores.items():
            found.setdefault(way, []).append(score[""])
    return {way: sum(values) / len(values) for way, values in found.items()}
