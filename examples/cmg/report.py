"""Report a run: metrics.json and the printed table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmvq.functional import code_usage

from .clips import SPLITS, Clips
from .files import write_atomic

_FIELDS = (
    "dataset",
    "modalities",
    "seed",
    "seconds",
    "epochs",
    "classification",
    "localization",
    "agreement",
    "codebook",
)


def code_counts(indices: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Count how often each modality chose each code.

    Args:
        indices: Name -> int64 of any shape, -1 for padding.
        size: Number of codes L.

    Returns:
        Name -> int64 [L].
    """
    return {name: i[i >= 0].cpu().bincount(minlength=size) for name, i in indices.items()}


def codebook_summary(
    indices: Mapping[str, Tensor], size: int, share: float = 0.05
) -> dict[str, Any]:
    """Summarize the use of the codes, for "codebook" in metrics.json.

    Args:
        indices: Name -> int64 [N, T], the code of every segment, -1 for padding.
        size: Number of codes L.
        share: A modality holds a code if more than this share of the code's segments are its own.

    Returns:
        "size"; "used", the number of codes in use; "perplexity", exp of the entropy of all choices
        together; "shared_fraction", the part of the used codes that two or more modalities
        hold; "per_modality", the "used" and "perplexity" of each modality.
    """
    counts = {name: n.double() for name, n in code_counts(indices, size).items()}
    usage = code_usage(counts, share)
    total = torch.stack(list(counts.values())).sum(0)
    used = int((~usage.dead).sum())
    return {
        "size": size,
        "used": used,
        "perplexity": float(code_usage({"all": total}).perplexity["all"]),
        "shared_fraction": int(usage.shared.sum()) / max(used, 1),
        "per_modality": {
            name: {"used": int((n > 0).sum()), "perplexity": float(usage.perplexity[name])}
            for name, n in counts.items()
        },
    }


def description(name: str, clips: Clips) -> str:
    """What a data set was taken as: clips, modalities, classes, splits, masks, unused arrays."""
    lines = [f"{name}: {len(clips.split):,} clips of {clips.segments} segments"]
    for m, x in clips.features.items():
        encoder = f", features of {clips.encoders[m]}" if m in clips.encoders else ""
        missing = ""
        if m in clips.masks:
            valid = clips.masks[m]
            missing = (
                f", {valid.double().mean():.0%} of the segments valid, "
                f"{int((~valid.any(1)).sum()):,} clips without it"
            )
        labels = "labels of segments" if m in clips.segment_labels else "no labels of segments"
        shape = " x ".join(map(str, x.shape[2:]))
        lines.append(f"  {m}: {shape} per segment{encoder}, {labels}{missing}")
    names = f" ({_some(clips.class_names)})" if clips.class_names else ""
    lines.append(f"  classes: {clips.num_classes}{names}" if clips.labelled else "  no labels")
    counts = {use: len(clips.rows(number)) for use, number in SPLITS.items()}
    lines.append("  splits: " + ", ".join(f"{use} {n:,}" for use, n in counts.items()))
    if clips.unused:
        unused = _some([f"{x} {kind}" for x, kind in clips.unused.items()])
        lines.append(f"  not used: {unused}")
    return "\n".join(lines)


def _some(names: Sequence[str], most: int = 8) -> str:
    """The first names, and how many there are besides."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def headline(metrics: Mapping[str, Any], folder: Path) -> str:
    """The first printed line: data, time, and use of the codes."""
    book = metrics["codebook"]
    return (
        f"{metrics['dataset']}: {metrics['epochs']} epochs, {metrics['seconds']:.0f} s in all; "
        f"{book['used']} of {book['size']} codes in use (perplexity {book['perplexity']:.0f}), "
        f"{book['shared_fraction']:.0%} of them shared; results in {folder}\n"
    )


def write_metrics(path: str | Path, metrics: Mapping[str, Any]) -> None:
    """Write metrics.json atomically.

    Args:
        path: The file.
        metrics: Values of exactly the fields dataset, modalities, seed, seconds, epochs,
            classification, localization, agreement and codebook. All numbers must be finite.

    Raises:
        ValueError: A field is missing, unknown or not finite.
    """
    if set(metrics) != set(_FIELDS):
        raise ValueError(f"write_metrics: fields must be {list(_FIELDS)}; got {list(metrics)}.")
    ordered = {name: metrics[name] for name in _FIELDS}
    write_atomic(path, (json.dumps(ordered, indent=2, allow_nan=False) + "\n").encode())


def table(metrics: Mapping[str, Any], reference: Mapping[str, Any] | None = None) -> str:
    """The table printed at the end: a line for each direction.

    Without labels, only "same code" and "by chance" are known.

    "of bound" is accuracy / upper bound. "tokens" is the accuracy of `evaluation.TokenNaiveBayes`,
    from the indices of the codes alone. "same code" is the agreement of the two modalities where
    both show the same event, and "by chance" what it would be if they chose codes independently.

    Args:
        metrics: "classification", "localization" and "agreement", as `evaluation.evaluate` returns
            them.
        reference: Result of `reference.cca_reference`, for two more columns: linear CCA with the
            same head, and with logistic regression on the mean over time.
    """
    sharing = {"same code": "share", "by chance": "chance"}
    sharing_columns = {
        name: [scores[key] for scores in metrics["agreement"].values()]
        for name, key in sharing.items()
    }
    if not metrics["classification"]:
        note = "no labels, so there are no classifiers; on the clips that were held out:"
        return f"{note}\n\n{_block([*metrics['agreement']], sharing_columns)}"
    clips = _columns("classification", "clip accuracy", "accuracy", "upper_bound", metrics)
    segments = _columns(
        "localization", "segment accuracy", "segment_accuracy", "upper_bound_accuracy", metrics
    )
    for name, key in (("F1", "segment_f1"), ("F1 bound", "upper_bound")):
        segments[name] = [scores[key] for scores in metrics["localization"].values()]
    if reference is not None:
        clips |= _linear("classification", "accuracy", reference)
        segments |= _linear("localization", "segment_accuracy", reference)
    blocks = [_block([*metrics["classification"]], clips | sharing_columns)]
    if metrics["localization"]:
        blocks.append(_block([*metrics["localization"]], segments))
    return "\n\n".join(blocks)


def _columns(
    task: str, title: str, score: str, bound: str, metrics: Mapping[str, Any]
) -> dict[str, list[float]]:
    """The columns that both blocks have."""
    ways = [*metrics[task].values()]
    return {
        title: [scores[score] for scores in ways],
        "chance": [scores["chance"] for scores in ways],
        "upper bound": [scores[bound] for scores in ways],
        "of bound": [scores[score] / max(scores[bound], 1e-9) for scores in ways],
        "tokens": [scores["token_accuracy"] for scores in ways],
    }


def _linear(task: str, score: str, reference: Mapping[str, Any]) -> dict[str, list[float]]:
    return {
        name: [scores[score] for scores in found[task].values()]
        for name, found in (("CCA", reference), ("CCA + LR", reference["logistic_regression"]))
    }


def _block(ways: list[str], columns: Mapping[str, list[float]]) -> str:
    ways = [*ways, "mean"]
    first = max(map(len, ways))
    lines = [" " * first + "".join(f"  {name:>8}" for name in columns)]
    for i, way in enumerate(ways):
        cells = ""
        for name, values in columns.items():
            value = values[i] if i < len(values) else sum(values) / len(values)
            text = f"{value:.0%}" if name == "of bound" else f"{value:.3f}"
            cells += f"  {text:>{max(8, len(name))}}"
        lines.append(f"{way:<{first}}{cells}")
    return "\n".join(lines)
