"""The numbers of the paper in per cent: Xia, Huang, Zhu and Zhao, NeurIPS 2023, Tables 1 to 5.

Each row has four numbers: AVE V->A and A->V (clips), AVVP V->A and A->V (segments), with 40K clips
unless the name says otherwise. The AVVP numbers are precision in the released code (the paper calls
them accuracy). Their order may be compared with that of an F1, but not their size.
"""

from __future__ import annotations

from collections.abc import Mapping

Row = tuple[float, float, float, float]

PAPER: dict[str, Row] = {
    # Table 1
    "baseline": (5.5, 5.4, 6.9, 8.7),
    "s-mit": (14.4, 15.9, 19.0, 22.3),
    "mst": (19.5, 23.1, 22.7, 24.5),
    "codis": (20.8, 26.4, 35.1, 37.9),
    "turn": (19.1, 24.3, 36.9, 39.3),
    "cmcm": (32.7, 36.8, 41.9, 45.1),
    "dcid-s-mit": (32.2, 34.0, 47.8, 53.0),
    "dcid-mst": (34.9, 37.8, 54.4, 59.1),
    "dcid-turn": (29.7, 36.9, 55.2, 58.2),
    "dcid-codis": (36.7, 41.0, 52.6, 62.0),
    "dcid-cmcm": (36.4, 42.9, 58.7, 62.8),
    "uni-code": (47.7, 52.3, 64.0, 65.6),
    "uni-code 24K": (44.0, 49.7, 61.9, 65.7),
    "uni-code 81K": (41.2, 45.6, 60.5, 61.7),
    # Table 2
    "without-club": (37.2, 40.3, 52.9, 59.5),
    "without-cpc": (5.2, 7.1, 12.3, 24.1),
    "without-club-cpc": (35.2, 36.9, 32.3, 34.0),
    "without-mm-ema": (36.4, 42.9, 58.7, 62.8),
    "without-reset": (38.9, 40.3, 55.4, 62.1),
    "without-matching": (41.3, 46.0, 58.7, 62.8),
    "without-mm-ema-reset": (31.5, 33.8, 46.0, 48.3),
    # Table 3, audio, video and text
    "avt": (54.1, 55.0, 63.4, 71.0),
    "avt-without-club": (50.2, 51.8, 62.4, 66.2),
    "avt-without-cpc": (43.8, 49.2, 59.3, 61.1),
    "avt-without-mm-ema": (52.9, 49.9, 62.0, 67.3),
    "avt-without-mm-ema-reset": (33.0, 35.5, 56.7, 61.2),
    "avt-without-reset": (50.8, 47.8, 56.4, 61.1),
    "avt-without-matching": (52.4, 54.5, 57.5, 72.9),
}


# Four numbers each, as the columns of `report_tasks.TABLES`.
OTHER_SETS: dict[str, Row] = {  # Table 3: F1 from AVE to AVVP, accuracy between UCF and VGGSound
    "avt": (53.0, 52.4, 67.1, 60.6),
    "avt-without-club": (50.1, 51.2, 9.87, 9.59),
    "avt-without-cpc": (45.5, 50.6, 60.6, 54.6),
    "avt-without-mm-ema": (48.1, 46.8, 66.5, 60.5),
    "avt-without-mm-ema-reset": (7.4, 12.6, 43.3, 35.2),
    "avt-without-reset": (47.9, 50.4, 60.0, 49.8),
    "avt-without-matching": (50.5, 48.7, 69.9, 59.7),
}
SEGMENTATION: dict[str, Row] = {  # Table 4: mIoU and F-score, A2T and T2A
    "avt-baseline": (69.8, 81.4, 69.9, 81.3),
    "avt": (78.0, 87.1, 77.7, 86.7),
}
RETRIEVAL: dict[str, Row] = {  # Table 5: R@5 and R@10, V2T and T2V
    "avt-baseline": (0.47, 1.03, 0.62, 0.85),
    "avt": (10.3, 21.9, 8.47, 16.7),
}


def paper_contrast(weights: Mapping[str, float]) -> tuple[float, float] | None:
    """The weighted sum of the paper's numbers for clips and segments, means of both directions.

    None if the paper has no numbers, only a curve (Fig. 3).
    """
    if not set(weights) <= set(PAPER):
        return None
    rows = [(weight, PAPER[name]) for name, weight in weights.items()]
    clips = sum(weight * (row[0] + row[1]) / 2 for weight, row in rows)
    return clips, sum(weight * (row[2] + row[3]) / 2 for weight, row in rows)
