"""Presets of model and training settings. All use the networks of this example.

"digits", the default, learns from a few hundred clips, of any kind. Most of its settings were
chosen by cross-validation on split 1 (see `diagnosis`) of two data sets, the digits and animals,
and then checked on six others. The eight are pictures, recordings, speech, sentences and sensors,
with 4 to 40 classes, 1 to 40 segments and 200 to 5,000 clips. The head's penalty was first compared
on split 2 of one set; by cross-validation on split 1 of the two it is at most 0.012 below the best.
The other two presets need tens of thousands of clips: on the digits they stay near chance.

"paper": Sec. 4 and 5 of Xia et al. 2023. Settings that the paper does not give (batch size,
learning rates, epochs, N_re) are those of the released code.

"cmg-released": haihuangcode/CMG, audio-video-text. The released Cross-CPC sums over the directions
and adds each modality's prediction of itself at weight 0.1; ours averages over the directions, so
its weight is their number. The separate EMA step of each modality and other details of the released
code, for which there is `mmvq.compat.cmg`, are not reproduced.
"""

from __future__ import annotations

from typing import Any

_CONFIG = {
    "dim": 256,
    "specific_dim": 256,
    "codebook_size": 400,
    "decay": 0.99,
    "dropout": 0.1,
    "assignment": "own",
    "partner": "attention",
    "partner_weight": 0.5,
    "club": "bound",
    "matching": "clips",
    "without": ("contrast",),
}
_RECIPE = {
    "epochs": 5,
    "batch_size": 80,
    "segments": 1.0,
    "most_segments": None,
    "learning_rate": 4e-4,
    "weight_decay": 0.0,
    "schedule": "constant",
    "club_learning_rate": 1e-3,
    "club_steps": 5,
    "clip_norm": 0.5,
    "club": 1.0,
    "commitment": 1.0,
    "matching": 1.0,
    "spread": 0.0,
    "ramp": 0.0,
}

PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # fields of Config, of Recipe
    "digits": ({}, {}),
    "paper": (
        {**_CONFIG, "beta": 0.25, "cross_ratio": 0.5, "reset_after": 300, "cpc": {}},
        {**_RECIPE, "cpc": 2.0},
    ),
    "cmg-released": (
        {
            **_CONFIG,
            "beta": 0.5,
            "cross_ratio": 0.5,
            "partner": "aligned",
            "reset_after": 301,
            "reset_rule": "any",
            "club_negatives": "shuffled",
            "cpc": {
                "normalize_over": "contexts",
                "num_layers": 2,
                "min_context": 2,
                "self_weight": 0.05,
            },
        },
        {**_RECIPE, "cpc": 6.0, "matching": 1.5},
    ),
}
