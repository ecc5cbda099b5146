"""Read the features and labels that the authors released, in their own folders and formats.

`sets` has a loader for each data set and for the pairs of sets (AVE with AVVP, UCF with VGGSound).
`avs` reads AVSBench-S4. `text` encodes the prompts. `arrays` reads the pickles inside the zips,
and accepts only numpy arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..clips import Clips
from ..errors import DataError
from .sets import ReleasedSet, ave, avvp, vggsound_avel
from .text import with_text

SETS: dict[str, tuple[Callable[[Path], ReleasedSet], str]] = {  # kind -> loader, files in ROOT
    "vggsound-avel": (
        vggsound_avel,
        "vggsound-avel40k.csv VggsoundAVEL40kCategories.txt vggsoundCategories2Prompts.csv "
        "audio/zip video/zip label/zip",
    ),
    "ave": (
        ave,
        "visual_feature.h5 audio_feature.h5 labels.h5 train_order.h5 val_order.h5 test_order.h5",
    ),
    "avvp": (
        avvp,
        "data/AVVP_eval_audio_checked_combined.csv data/AVVP_eval_visual_checked_combined.csv "
        "data/AVVP_Categories.txt feature/audio/zip feature/video/zip",
    ),
}

__all__ = ["SETS", "load_released"]


def load_released(
    kind: str, root: str, modalities: Sequence[str] | None = None, text_encoder: str = ""
) -> Clips:
    """Load the clips of a released set.

    Args:
        kind: Name of the set, a key of SETS.
        root: Folder of the set.
        modalities: The modalities to load. None is audio and video; "text" must be named.
        text_encoder: Encoder of the prompts, see `with_text`.

    Raises:
        DataError: A file is missing or malformed, or there is no such modality.
    """
    read, layout = SETS[kind]
    missing = [x for x in layout.split() if not root or not (Path(root) / x).exists()]
    if missing:
        rule = f"ROOT in {kind}:ROOT must be a folder with {layout}"
        raise DataError(f"{kind}:{root}: {rule}; it lacks {' '.join(missing)}.")
    found = read(Path(root))
    if "text" in (modalities or ()):
        found = with_text(found, text_encoder)
    clips = found.clips()
    for name in modalities or ():
        if name not in clips.features:
            offered = ", ".join(clips.modalities)
            raise DataError(f"{kind}:{root}: no modality '{name}'. The set has: {offered}.")
    return clips.only(modalities or clips.modalities)
