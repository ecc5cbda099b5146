"""The claims of the paper as differences that should be positive, and open questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .matrix import CLIPS, SEEDS
from .results import Results, Score, clips, contrast, segments
from .systems import ALIGNMENTS

Weights = dict[str, float]
PARTS = {
    "club": "CLUB",
    "cpc": "Cross-CPC",
    "club-cpc": "CLUB and Cross-CPC",
    "mm-ema": "MM-EMA",
    "reset": "reset",
    "matching": "code matching",
    "mm-ema-reset": "MM-EMA and reset",
}
SYSTEMS = {name: name.upper().replace("S-MIT", "S-MiT") for name in ALIGNMENTS}


@dataclass(frozen=True, eq=False)
class Claim:
    """A weighted sum of experiments that should be positive.

    Attributes:
        text: The claim in words.
        weights: Experiment -> weight in the sum.
        paper: The same with names of `paper.PAPER`, if these differ.
    """

    text: str
    weights: Weights
    paper: Weights | None = None

    @property
    def in_paper(self) -> Mapping[str, float]:
        """The weights by names of `paper.PAPER`."""
        return self.weights if self.paper is None else self.paper


def _better(one: str, other: str) -> Weights:
    return {one: 1.0, other: -1.0}


def _part(prefix: str, full: str, part: str) -> Claim:
    return Claim(f"with {PARTS[part]} over without", _better(full, f"{prefix}without-{part}"))


def _smaller_loss(part: str) -> Claim:
    two, three = _better("uni-code", f"without-{part}"), _better(f"avt-without-{part}", "avt")
    return Claim(f"leaving out {PARTS[part]} costs less than with two", two | three)


_HALF = f"clips-{CLIPS // 2}"
CLAIMS: dict[str, list[Claim]] = {
    "Aligning modalities beats not aligning them (Table 1)": [
        Claim(f"{text} over the baseline", _better(name, "baseline"))
        for name, text in SYSTEMS.items()
    ],
    "CMCM is the best of the earlier systems (Table 1)": [
        Claim(f"CMCM over {text}", _better("cmcm", name))
        for name, text in SYSTEMS.items()
        if name != "cmcm"
    ],
    "DCID improves every system (Table 1)": [
        Claim(f"DCID+{text} over {text}", _better(f"dcid-{name}", name))
        for name, text in SYSTEMS.items()
    ],
    "Uni-Code is the best (Table 1)": [
        Claim(f"Uni-Code over DCID+{text}", _better("uni-code", f"dcid-{name}"))
        for name, text in SYSTEMS.items()
    ],
    "Every part helps, with two modalities (Table 2)": [
        *(_part("", "uni-code", part) for part in PARTS),
        Claim("without CLUB over without Cross-CPC", _better("without-club", "without-cpc")),
        Claim("with neither over with CLUB alone", _better("without-club-cpc", "without-cpc")),
    ],
    "Every part helps, with three modalities (Table 3)": [
        _part("avt-", "avt", part) for part in PARTS if part != "club-cpc"
    ],
    "A third modality helps the first two (Table 3)": [
        Claim("audio, video, text over audio, video", _better("avt", "uni-code")),
        *(_smaller_loss(part) for part in PARTS if part != "club-cpc"),
    ],
    "A middling codebook is the best (Fig. 3)": [
        Claim("128 codes over 32", _better("uni-code", "codes-32")),
        Claim("128 codes over 512", _better("uni-code", "codes-512")),
    ],
    "More clips help, but not the most (Table 1)": [
        Claim(
            "half of the clips over a quarter",
            _better(_HALF, f"clips-{CLIPS // 4}"),
            _better("uni-code", "uni-code 24K"),
        ),
        Claim(
            "half of the clips over all",
            _better(_HALF, "uni-code"),
            _better("uni-code", "uni-code 81K"),
        ),
    ],
}
QUESTIONS: list[Claim] = [
    Claim("partner by attention over the aligned one", _better("uni-code", "partner-aligned")),
    Claim("partner by attention over none", _better("uni-code", "partner-none")),
    Claim("reset by the rule of all over any", _better("uni-code", "reset-any")),
    Claim("CLUB exact over shuffled", _better("uni-code", "club-shuffled")),
]
SHARING: list[Claim] = [
    Claim("CMCM over the baseline", _better("cmcm", "baseline")),
    Claim("Uni-Code over CMCM", _better("uni-code", "cmcm")),
]
REASONS: dict[str, str] = {  # group -> why some of it may not repeat here
    "CMCM is the best of the earlier systems (Table 1)": "MST, CODIS, TURN and CMCM all contrast "
    "whole clips here, with the same encoders, temperature and batches. What sets CMCM apart, the "
    "matching of codes, has a tenth of the weight in its loss. The paper does not say how it "
    "trained the others.",
    "DCID improves every system (Table 1)": "The differences are positive, but several times "
    "smaller than the paper's. The earlier systems already bring the modalities of a clip "
    "together, which is most of what Cross-CPC does on its own.",
    "Every part helps, with two modalities (Table 2)": "The reset has little to do, since k-means "
    "starts the codebook after the features have spread, and few codes die. CLUB helps little: its "
    "weight is small, since at 1, as in the paper, the other losses suffer.",
    "Every part helps, with three modalities (Table 3)": "CLUB and the reset help little with two "
    "modalities, and less with three.",
    "A third modality helps the first two (Table 3)": "That text helps audio and video is clear. "
    "That each part is then less needed is not: these are differences of differences, whose noise "
    "is larger than most of them. The paper's are of single runs. Cross-CPC is needed more with "
    "three modalities, since it is what brings text to the others.",
    "A middling codebook is the best (Fig. 3)": "The head sees the vectors of the codes, and with "
    "more codes these say more. That two modalities then seldom have the same code (Fig. 3) does "
    "not harm it, as near codes have similar vectors. For a task that sees the indices alone, a "
    "smaller codebook may be better.",
    "More clips help, but not the most (Table 1)": "Nothing suggests that more clips should harm. "
    "The paper's drop from 40 to 81 thousand clips is of single runs.",
}
SCORES: dict[str, Score] = {"clips": clips, "segments": segments}


def have(results: Results, claim: Claim, seeds: Sequence[int] = ()) -> bool:
    """Whether all experiments of a claim were run with these seeds, or with any common one."""
    runs = [set(results[name]["runs"]) if name in results else set() for name in claim.weights]
    common = set.intersection(*runs)
    return set(map(str, seeds)) <= common if seeds else bool(common)


def undecided(results: Results) -> set[str]:
    """The experiments of claims and questions that are open after the first seeds.

    Open for clips or for segments. Further seeds have no influence, so that all of these are run.
    """
    every = [*(claim for group in CLAIMS.values() for claim in group), *QUESTIONS]
    return {
        name
        for claim in every
        if have(results, claim, SEEDS)
        and any(
            contrast(results, claim.weights, score, SEEDS).verdict == "open"
            for score in SCORES.values()
        )
        for name in claim.weights
    }
