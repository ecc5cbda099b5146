"""The files of the authors' released features and labels, as their folders have them.

    vggsound-avel:ROOT   vggsound-avel40k.csv, VggsoundAVEL40kCategories.txt,
                         vggsoundCategories2Prompts.csv, {audio,video,label}/zip/ID.zip
    ave:ROOT             visual_feature.h5, audio_feature.h5, labels.h5,
                         {train,val,test}_order.h5
    avvp:ROOT            data/AVVP_eval_{audio,visual}_checked_combined.csv,
                         data/AVVP_Categories.txt, feature/{audio,video}/zip/ID.zip

`sets` has a loader for each, and for the pairs of sets (AVE with AVVP, UCF with VGGSound); `text`
reads the prompts, `avs` has AVSBench-S4. `arrays` reads the pickles inside the zips, and takes
numpy arrays and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .sets import ReleasedSet, ave, avvp, vggsound_avel

SETS: dict[str, Callable[[Path], ReleasedSet]] = {
    "vggsound-avel": vggsound_avel,
    "ave": ave,
    "avvp": avvp,
}

__all__ = ["SETS", "ReleasedSet"]
