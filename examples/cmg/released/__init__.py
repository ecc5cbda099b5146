"""The files of the authors' released features and labels, as their folders have them.

`sets` has a loader for each, and for the pairs of sets (AVE with AVVP, UCF with VGGSound); `text`
reads the prompts, `avs` has AVSBench-S4. `arrays` reads the pickles inside the zips, and takes
numpy arrays and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..data import Clips
from ..errors import DataError
from .sets import ReleasedSet, ave, avvp, vggsound_avel
from .text import with_text

SETS: dict[str, tuple[Callable[[Path], ReleasedSet], str]] = {  # kind -> loader, what ROOT holds
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

__all__ = ["SETS", "ReleasedSet", "load_released"]


def load_released(
    kind: str, root: str, modalities: Sequence[str] | None = None, text_encoder: str = ""
) -> Clips:
    """The clips of a released set.

    Args:
        kind: One of SETS.
        root: Its folder.
        modalities: None takes audio and video; "text" is only there if it is asked for.
        text_encoder: As `with_text` takes it.

    Raises:
        DataError: The folder lacks something that the set is made of, a file is odd, or there is no
            such modality.
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
            raise DataError(f"{kind}:{root}: no modality '{name}'. The set offers: {offered}.")
    return clips.only(modalities or clips.modalities)
