"""Where clips come from: the built-in digits, files, Hugging Face `datasets`, the authors' sets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from . import digits
from .clips import Clips
from .data import load_clips
from .errors import DataError
from .hugging_face import load_datasets
from .released import SETS, load_released


def open_data(
    data: str, modalities: Sequence[str] | None = None, text_encoder: str = ""
) -> tuple[str, Clips]:
    """Open the data that `--data` names.

    Args:
        data: "digits", "digits:SEED", "KIND:ROOT" of a released set, "datasets:FOLDER" or
            "datasets:NAME", or the path of an npz file or of a folder of .npy files.
        modalities: The modalities to read, two or more. None reads all.
        text_encoder: The encoder of prompts, see `released.text.with_text`.

    Returns:
        A short name of the data, and the clips.

    Raises:
        DataError: The data cannot be read, or has fewer than two modalities.
    """
    kind, _, rest = data.partition(":")
    if kind in SETS:
        name, clips = kind, load_released(kind, rest, modalities, text_encoder)
    elif kind == "digits" and (rest.isdecimal() or data == "digits"):
        name, clips = data.replace(":", "-"), load_clips(digits.load(int(rest or 0)), modalities)
    elif kind == "datasets" and rest:
        name, clips = Path(rest).name, load_datasets(rest, modalities)
    else:
        path = Path(os.path.abspath(data))
        name = path.name if path.is_dir() else path.stem
        clips = load_clips(data, modalities)
    if len(clips.modalities) < 2:
        raise DataError(
            f"{data}: cross-modal training takes two modalities or more; "
            f"got {' '.join(clips.modalities)}. Hint: each is a float array [N, T, ..., C]."
        )
    return name, clips


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
