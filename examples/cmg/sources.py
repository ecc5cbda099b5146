"""Where clips come from: the built-in digits, files, Hugging Face `datasets`, the authors' sets."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from . import digits
from .clips import Clips
from .data import Labels, load_clips
from .errors import DataError
from .hugging_face import load_datasets
from .released import SETS, load_released

_RENDERED = {"digits": digits.load, "numbers": digits.load_numbers}


def open_data(
    data: str,
    modalities: Sequence[str] | None = None,
    text_encoder: str = "",
    labels: Labels = "required",
) -> tuple[str, Clips]:
    """Open the data that `--data` names, to train or evaluate a model on.

    Args:
        data: "digits" or "numbers", "digits:SEED" or "numbers:SEED", "KIND:ROOT" of a released set,
            "datasets:FOLDER" or "datasets:NAME", or the path of an npz file or of a folder of .npy
            files.
        modalities: The modalities to read, two or more. None reads all.
        text_encoder: The encoder of prompts, see `released.text.with_text`.
        labels: Whether data without labels are read, see `data.load_clips`.

    Returns:
        A short name of the data, and the clips.

    Raises:
        DataError: The data cannot be read, or has fewer than two modalities.
    """
    name, clips = _open(data, modalities, text_encoder, labels)
    if len(clips.modalities) < 2:
        raise DataError(
            f"{data}: cross-modal training takes two modalities or more; "
            f"got {' '.join(clips.modalities)}. Hint: each is a float array [N, T, ..., C]."
        )
    return name, clips


def open_to_encode(
    data: str,
    known: Collection[str],
    modalities: Sequence[str] | None = None,
    text_encoder: str = "",
) -> Clips:
    """Open data to encode with a trained model. They need no labels, and one modality is enough.

    Args:
        data: As in `open_data`.
        known: The modalities of the model.
        modalities: The modalities to read; None: all that the data and the model have.
        text_encoder: As in `open_data`.

    Raises:
        DataError: The data cannot be read, or have no modality of the model.
    """
    if unknown := [name for name in modalities or () if name not in known]:
        rule = f"--modalities: the model takes {' '.join(known)}"
        raise DataError(f"{rule}; got {' '.join(unknown)}.")
    _, clips = _open(data, modalities, text_encoder, "ignored")
    both = [name for name in clips.modalities if name in known]
    if not both:
        rule = f"must have a modality of the model, {' '.join(known)}"
        raise DataError(f"{data}: {rule}; got {' '.join(clips.modalities)}.")
    return clips.only(both)


def _open(
    data: str, modalities: Sequence[str] | None, text_encoder: str, labels: Labels
) -> tuple[str, Clips]:
    """A short name of the data, and the clips."""
    kind, _, rest = data.partition(":")
    if kind in SETS:
        return kind, load_released(kind, rest, modalities, text_encoder)
    if kind in _RENDERED and (rest.isdecimal() or data == kind):
        file = _RENDERED[kind](int(rest or 0))
        return data.replace(":", "-"), load_clips(file, modalities, labels)
    if kind == "datasets" and rest:
        return Path(rest).name, load_datasets(rest, modalities, labels)
    path = Path(os.path.abspath(data))
    return path.name if path.is_dir() else path.stem, load_clips(data, modalities, labels)


def open_downstream(data: str, trained: Clips, text_encoder: str = "") -> Clips:
    """Open another data set for a model trained on the clips `trained`.

    Args:
        data: As in `open_data`.
        trained: The clips of pre-training.
        text_encoder: As in `open_data`.

    Returns:
        The clips in the modalities that both sets have.

    Raises:
        DataError: The sets share fewer than two modalities, or their features differ in shape.
    """
    _, clips = open_data(data, None, text_encoder)
    both = [name for name in trained.modalities if name in clips.features]
    if len(both) < 2:
        raise DataError(
            f"--downstream {data}: must have two of {' '.join(trained.modalities)} or more; "
            f"got {' '.join(clips.modalities)}."
        )
    for name in both:
        x = trained.features[name]
        clips.require(name, x.shape[1], x.shape[-1], f"--downstream {data}")
    return clips.only(both)
