"""Write the page docs/experiments/index.md and its pictures from the results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean

from cmg import digits
from cmg.digits.style import NUMBERS
from cmg.files import write_atomic
from cmg.training import Recipe

from . import figures
from .claims import QUESTIONS, SYSTEMS, have
from .matrix import CHOICE, CLIPS, EPOCHS, EXPERIMENTS, MAPPED, MORE_SEEDS, SEEDS, STRENGTHS
from .paper import PAPER
from .report_claims import claim_sections, marked
from .report_tasks import task_sections
from .results import (
    Results,
    Score,
    agreement,
    clip_bound,
    clips,
    contrast,
    estimate,
    precision,
    read_results,
    segments,
    shared,
)
from .tables import comparison, paragraph, table, title

AV = ("video->audio", "audio->video")


def write_report(folder: Path, docs: Path) -> None:
    """Write index.md and its pictures into `docs` from the results in `folder`.

    Raises:
        DataError: There are no results.
    """
    results = read_results(folder)
    sections = [
        _head(results),
        *claim_sections(results, docs),
        _setting(docs),
        _method(results),
        _systems(results),
        _parts(results, "", "Table 2: audio and video"),
        _parts(results, "avt-", "Table 3: audio, video and text"),
        _codebooks(results, docs),
        _numbers(results, docs),
        _codes(results, docs),
        *task_sections(results, folder, docs),
        _questions(results),
    ]
    text = "\n\n".join(section for section in sections if section)
    write_atomic(docs / "index.md", f"{text}\n".encode())


def _head(results: Results) -> str:
    missing = [
        name
        for name in EXPERIMENTS
        if not {*map(str, SEEDS)} <= set(results.get(name, {"runs": ()})["runs"])
    ]
    notes = f"\n\nNot yet run with every seed: {', '.join(missing)}." if missing else ""
    return f"""# Experiments

<!-- written by examples/cmg_experiments.py --report from docs/experiments/results -->
Which results of the paper (Xia et al. 2023) hold on the numbers, a small data set that is rendered
here: its systems, ablations, tasks and figures. Training uses {CLIPS:,} unlabelled clips; the paper
uses 24 to 81 thousand. So compare the order of systems, not the values.{notes}

```bash
python examples/cmg_experiments.py                  # what there is, and what has no result yet
python examples/cmg_experiments.py --run --jobs 2   # trains and tests that
python examples/cmg_experiments.py --report         # this page
```"""


def _setting(docs: Path) -> str:
    figures.plot_clip(docs / "clip.png")
    style, names = NUMBERS, NUMBERS.things.names
    _, train, test, validation = digits.NUMBERS_CLIPS
    shown = f"""The {len(names)} classes are numbers from {names[0]} to {names[-1]}. A clip has ten
        segments of one second. All modalities show its number for {style.length[0]} to
        {style.length[1]} segments, but not at quite the same time (moved by up to {style.shifted}
        segment), and each misses a segment of it with a probability of {style.missed:.0%}. With a
        probability of {style.distracted:.0%} a modality also shows another number outside the
        event. Handwriting, voices, sentences, names and nouns of the test are those of no other
        split. In {style.clutter:.0%} of the segments there is a stray digit in the picture, a
        hum or siren under the speech, or a quarter of the letters is wrong."""
    split = f"""There are {train} clips with labels, about {train / len(names):.0f} of each class,
        {test} to test on, and {validation} for choices. `--data numbers` opens the set, and
        `examples/cmg/digits/style.py` has its settings."""
    picture = "![A clip: frames, sound and sentences](clip.png)"
    return "\n\n".join(("## The data: numbers", picture, paragraph(shown), paragraph(split)))


def _method(results: Results) -> str:
    runs = [run for result in results.values() for run in result["runs"].values()]
    choices = sum(len(result["choices"]) for result in results.values())
    seconds = [run["seconds"] for run in runs]
    hours = (sum(seconds) + choices * mean(seconds)) / 3600
    guess = mean(x["chance"] for run in runs for x in run["clips"].values())
    bound = ""
    if "uni-code" in results:
        audio, video = (estimate(results["uni-code"], clip_bound, (way,)) for way in AV)
        bound = f"""The bound, the same head trained and tested on one modality, is {audio.mean:.2f}
            in audio and {video.mean:.2f} in video for Uni-Code."""
    points = (
        f"""**Training.** All systems have the same encoders, decoders, codebook, optimiser and
        {EPOCHS} epochs ({EPOCHS * (CLIPS // Recipe.batch_size)} steps, each on a random half of the
        segments). They differ in their objectives; MST also shares weights between the encoders.
        Each follows its paper's equations at a smaller scale, which its file in
        `examples/experiments/systems` explains.""",
        f"""**Choices.** Every row of every table gets the same {len(STRENGTHS)} choices: the weight
        of what brings the modalities together (Cross-CPC, code matching, and the objective of an
        earlier system) is multiplied by {", ".join(f"{x:g}" for x in STRENGTHS)}. Without any of
        these it is the weight of the commitment loss. The best is chosen by the validation split of
        a rendering that is used for nothing else (seed {CHOICE}), by the mean of clip accuracy and
        segment F1. Nothing is chosen on a test split.""",
        f"""**Test.** After the last epoch, a head is trained with labels of one modality in split 1
        and tested on another modality in split 2. The best constant guess is right for {guess:.2f}
        of the clips. {bound}""",
        f"""**Uncertainty.** "±" is half of the 95% interval (Student's t) of the mean over seeds.
        A seed is a rendering of the data and the random numbers of training; differences are taken
        seed by seed. There are {len(SEEDS)} seeds, and {len(MORE_SEEDS)} more where a claim was
        open after these. (Adding seeds where a claim is open makes slightly more than one verdict
        in twenty wrong by chance. The noise of the choices, which are of one seed, is not in the
        intervals.)""",
        f"""**Cost.** {len(runs)} tests and {choices} choices took about {hours:.1f} hours of one
        core.""",
    )
    words = """CLUB, Cross-CPC, reset and code matching are parts of the paper's method. MM-EMA is
        its multi-modal moving average. DCID adds CLUB and Cross-CPC to another system. S-MiT, MST,
        CODIS, TURN and CMCM are earlier systems. V→A: labels of video, tests on audio. "Codes
        shared" is the share of codes in use of which no modality holds more than 80%, as in Fig. 4.
        "Same code" is the share of segments with the same event in which both modalities have the
        same code. "Strength" is the factor that was chosen."""
    bullets = "\n".join(paragraph(point, "- ") for point in points)
    return f"## How it is measured\n\n{bullets}\n\n{paragraph(words)}"


_COLUMNS = (
    *("clips V→A", "A→V", "F1 V→A", "A→V", "precision V→A", "A→V"),
    *("codes shared", "same code", "strength", "seeds"),
)
_PAPER_COLUMNS = ("AVE V→A", "A→V", "AVVP V→A", "A→V")


def _comparison(results: Results, names: Iterable[str]) -> str:
    """A table of experiments with the numbers of the paper."""
    rows = {}
    for name in names:
        if name in results:
            cells = [
                estimate(results[name], score, (way,))
                for score in (clips, segments, precision)
                for way in AV
            ]
            cells += [estimate(results[name], score, AV) for score in (shared, agreement)]
            (strength,) = {run["strength"] for run in results[name]["runs"].values()}
            rows[name] = [*(f"{x:.2f}" for x in cells), f"{strength:g}", f"{cells[0].seeds}"]
    return comparison(rows, _COLUMNS, PAPER, _PAPER_COLUMNS) if rows else ""


def _systems(results: Results) -> str:
    names = ["baseline", *SYSTEMS, *(f"dcid-{name}" for name in SYSTEMS), "uni-code"]
    return f"""## Table 1: systems

Pre-trained on audio and video. The paper's DCID+CMCM is its Uni-Code without MM-EMA (Tables 1 and 2
have the same numbers). Here CMCM follows its own paper: it has a contrastive term, and no reset.

{_comparison(results, names)}"""


def _parts(results: Results, prefix: str, heading: str) -> str:
    names = [name for name in EXPERIMENTS if name.startswith(f"{prefix}without-")]
    names.append("avt" if prefix else "uni-code")
    body = _comparison(results, names)
    return f"## {heading}\n\n{body}" if body else ""


def _codebooks(results: Results, docs: Path) -> str:
    names = {L: "uni-code" if L == 128 else f"codes-{L}" for L in (32, 64, 128, 256, 512)}
    body = _sizes(results, names, "codes", docs / "codebook-size.png")
    return f"## Fig. 3: size of the codebook\n\n{body}" if body else ""


def _numbers(results: Results, docs: Path) -> str:
    names = {n: f"clips-{n}" for n in (CLIPS // 4, CLIPS // 2)} | {CLIPS: "uni-code"}
    body = _sizes(results, names, "clips", docs / "clips.png")
    if not body:
        return ""
    return f"""## Number of clips for pre-training

The number of steps is the same, so fewer clips are seen more often.

{body}"""


def _sizes(results: Results, names: Mapping[int, str], label: str, image: Path) -> str:
    """A table and a picture of scores over sizes; empty with fewer than two sizes."""
    names = {size: name for size, name in names.items() if name in results}
    if len(names) < 2:
        return ""
    scores: dict[str, Score] = {"clips": clips, "segments (F1)": segments}
    others: dict[str, Score] = {"codes shared": shared, "same code": agreement}
    lines = {
        text: {size: estimate(results[name], score, AV) for size, name in names.items()}
        for text, score in (scores | others).items()
    }
    figures.plot_sizes(image, label, {text: lines[text] for text in scores})
    rows = [[text, *(f"{x:.2f}" for x in line.values())] for text, line in lines.items()]
    body = table((label, *map(str, names)), rows)
    return f"{body}\n\n![Scores over the number of {label}]({image.name})"


def _codes(results: Results, docs: Path) -> str:
    parts = []
    for name in MAPPED:
        run = results.get(name, {"runs": {}})["runs"].get("0", {})
        if "codes" in run:
            figures.plot_code_map(docs / f"codes-{name}.png", run["codes"])
            parts.append(f"**{title(name)}**\n\n![Codes of {title(name)}](codes-{name}.png)")
    heading = "## Fig. 4: modalities of the codes\n\nOf the models of seed 0."
    return "\n\n".join((heading, *parts)) if parts else ""


def _questions(results: Results) -> str:
    rows = []
    for claim in QUESTIONS:
        if have(results, claim):
            scores: tuple[Score, ...] = (clips, segments, shared)
            found = [contrast(results, claim.weights, score) for score in scores]
            rows.append([claim.text, *(f"{x:+.2f} ({marked(x.verdict)})" for x in found)])
    if not rows:
        return ""
    return f"""## Comparisons that the paper does not have

Differences and verdicts as for the claims.

{table(("", "clips", "segments (F1)", "codes shared"), rows)}"""
