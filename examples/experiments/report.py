"""Write the page docs/experiments/index.md and its pictures from the results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from cmg.files import write_atomic

from . import figures
from .claims import CLAIMS, QUESTIONS, SHARING, SYSTEMS, Claim
from .matrix import CLIPS, EXPERIMENTS, RECIPE
from .paper import PAPER, paper_contrast
from .report_tasks import task_sections
from .results import (
    Results,
    Score,
    clips,
    contrast,
    directions,
    estimate,
    precision,
    read_results,
    segments,
    shared_codes,
)
from .tables import comparison, table

AV = ("video->audio", "audio->video")
VERDICTS = {1: "yes", 0: "open", -1: "**no**"}

Row = Sequence[str]


def write_report(folder: Path, docs: Path) -> None:
    """Write index.md and its pictures into `docs` from the results in `folder`.

    Raises:
        DataError: There are no results.
    """
    results = read_results(folder)
    sections = [
        _head(results),
        _summary(results),
        _method(results),
        _claims(results),
        _systems(results),
        _longer(results),
        _parts(results, "", "Table 2: audio and video"),
        _parts(results, "avt-", "Table 3: audio, video and text"),
        _codebooks(results, docs),
        _numbers(results, docs),
        _codes(results, docs),
        _questions(results),
        _modalities(results),
        *task_sections(results, folder, docs),
    ]
    text = "\n\n".join(section for section in sections if section)
    write_atomic(docs / "index.md", f"{text}\n".encode())


def _head(results: Results) -> str:
    seeds = {seed for x in results.values() for seed in x}
    missing = [name for name in EXPERIMENTS if set(results.get(name, ())) != seeds]
    notes = f"\n\nNot yet run with every seed: {', '.join(missing)}." if missing else ""
    return f"""# Experiments

<!-- written by examples/cmg_experiments.py --report from docs/experiments/results -->
Which results of the paper (Xia et al. 2023) are reproduced on the built-in digits. The page covers
its systems, ablations, tasks and figures. Training uses {CLIPS} unlabelled clips; the paper uses 24
to 81 thousand. So compare the order of systems, not the values.

{_version(results)}{notes}

```bash
python examples/cmg_experiments.py                  # what there is, and what has no result yet
python examples/cmg_experiments.py --run --jobs 2   # trains and tests that
python examples/cmg_experiments.py --report         # this page
```"""


def _version(results: Results) -> str:
    """Whether the results are of the present recipe."""
    recipes = {run["identity"].get("recipe", 1) for x in results.values() for run in x.values()}
    if recipes == {RECIPE}:
        return "All results are of the present encoders, losses and heads."
    return (
        "**These results are of an earlier version of the demo**, with other encoders, another\n"
        "contrastive loss and another head. `--run` measures them again with the present version."
    )


def _summary(results: Results) -> str:
    """How many differences of each claim are positive."""
    rows: list[Row] = []
    every: list[list[int]] = [[], []]
    for group, claims in CLAIMS.items():
        found = [claim for claim in claims if _have(results, claim)]
        signs = [
            [contrast(results, claim.weights, score).sign for claim in found]
            for score in (clips, segments)
        ]
        rows += [[group, *map(_counts, signs)]] if found else []
        every = [[*before, *now] for before, now in zip(every, signs, strict=True)]
    rows.append(["**all**", *map(_counts, every)])
    return f"""## Which claims are reproduced

{table(("claim of the paper", "clips", "segments (F1)"), rows)}

Each claim is tested as a set of differences expected to be positive: between two systems, or with
and without a part. "yes": the 95% interval is above 0. "**no**": it is below 0. "open": it contains
0. With so many intervals at 95%, a few verdicts are wrong by chance."""


def _counts(signs: Sequence[int]) -> str:
    """The number of each verdict, such as `4 yes, 1 open`."""
    counts = {verdict: list(signs).count(sign) for sign, verdict in VERDICTS.items()}
    return ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n)


def _method(results: Results) -> str:
    runs = [result for seeds in results.values() for result in seeds.values()]
    seeds = ", ".join(map(str, sorted({seed for x in results.values() for seed in x})))
    ends = " or ".join(map(str, sorted({run["identity"]["epochs"] for run in runs})))
    chance = next(iter(runs[0]["classification"].values()))["chance"]
    minutes = sum(run["seconds"] for run in runs) / 60
    return f"""## How it is measured

- **Training.** All systems have the same encoders, decoders, codebook, optimiser and steps. They
  differ in their objectives. Each follows its paper's equations at a smaller scale, which its file
  in `examples/experiments/systems` explains. The recipe was tuned for the full model, on another
  rendering of the digits. The loss weights of other systems were not tuned. This favours Uni-Code.
- **Test.** After the last epoch ({ends}) a head is trained with labels of one modality in split 1
  and tested on another modality in split 2, which has other clips, writers, voices and sentences.
  The best constant prediction is right for {chance:.2f} of the clips.
- **Uncertainty.** "±" is half of the 95% interval (Student's t) of the mean over seeds ({seeds})
  of weights, batches and heads. The 300 test clips of the one rendering add an error of about 0.03
  per direction, which is partly common to all systems.
- **Cost.** {len(runs)} runs and {minutes:.0f} minutes of training and tests, each on one core of a
  shared machine.

CLUB, Cross-CPC, reset and code matching are parts of the paper's method. MM-EMA is its multi-modal
moving average. DCID adds CLUB and Cross-CPC to another system. S-MiT, MST, CODIS, TURN and CMCM are
earlier systems. V→A: labels of video, tests on audio. "Codes shared" is the share of codes in use
of which no modality holds more than 80%, as in Fig. 4."""


def _claims(results: Results) -> str:
    rows: list[Row] = []
    for group, claims in CLAIMS.items():
        found = [claim for claim in claims if _have(results, claim)]
        rows += [[f"**{group}**", *[""] * 6]] if found else []
        for claim in found:
            ours = [contrast(results, claim.weights, score) for score in (clips, segments)]
            theirs = [f"{x:+.1f}" for x in paper_contrast(claim.in_paper) or ()] or ["", ""]
            cells = [[f"{x:+.2f}", VERDICTS[x.sign], y] for x, y in zip(ours, theirs, strict=True)]
            rows.append([claim.text, *cells[0], *cells[1]])
    sharing = "\n".join(
        f"- {claim.text}: {difference:+.2f}, {VERDICTS[difference.sign]}"
        for claim in SHARING
        if _have(results, claim)
        for difference in [contrast(results, claim.weights, shared_codes)]
    )
    head = ("claim", "clips", "", "the paper", "segments (F1)", "", "the paper")
    return f"""## Every difference

"A over B" is the score of A minus that of B with the same seed, averaged over the directions. The
score is accuracy for clips and F1 for event segments. The paper's differences are of single runs,
in percentage points (mean of both directions, 40K clips unless the claim is about their number).

{table(head, rows)}

Differences in the share of shared codes (Fig. 4):

{sharing}"""


def _have(results: Results, claim: Claim) -> bool:
    return bool(set.intersection(*(set(results.get(name, ())) for name in claim.weights)))


_COLUMNS = ("clips V→A", "A→V", "F1 V→A", "A→V", "precision V→A", "A→V", "codes shared")
_PAPER_COLUMNS = ("AVE V→A", "A→V", "AVVP V→A", "A→V")


def _comparison(results: Results, names: Iterable[str]) -> str:
    """A table of experiments with the numbers of the paper."""
    rows = {
        name: [
            *(
                estimate(results[name], score, (way,))
                for score in (clips, segments, precision)
                for way in AV
            ),
            estimate(results[name], shared_codes, ()),
        ]
        for name in names
        if name in results
    }
    return comparison(rows, _COLUMNS, PAPER, _PAPER_COLUMNS) if rows else ""


def _systems(results: Results) -> str:
    names = ["baseline", *SYSTEMS, *(f"dcid-{name}" for name in SYSTEMS), "uni-code"]
    return f"""## Table 1: systems

Pre-trained on audio and video. The paper's DCID+CMCM is its Uni-Code without MM-EMA (Tables 1 and 2
have the same numbers). Here CMCM follows its own paper, with its contrastive term and without the
reset. TURN is implemented only as far as the paper describes it: crossed reconstruction.

{_comparison(results, names)}"""


def _longer(results: Results) -> str:
    names = [name for name in EXPERIMENTS if name.startswith("long-")]
    body = _comparison(results, names)
    if not body:
        return ""
    return f"""### Twice as long

The better systems, trained for as many epochs as the demo.
{_order_kept(results, names)}

{body}"""


def _order_kept(results: Results, longer: Sequence[str]) -> str:
    """The number of pairs of systems whose order is unchanged."""
    both = [(x.removeprefix("long-"), x) for x in longer if x in results]
    pairs = list(combinations([p for p in both if p[0] in results], 2))
    counts = []
    for kind, score in (("clips", clips), ("segments", segments)):
        kept = 0
        for (a, long_a), (b, long_b) in pairs:
            before, after = (
                contrast(results, {x: 1.0, y: -1.0}, score) for x, y in ((a, b), (long_a, long_b))
            )
            kept += before.mean * after.mean > 0
        counts.append(f"for {kind} {kept}")
    return f"Pairs of systems, out of {len(pairs)}, whose order is unchanged: {', '.join(counts)}."


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
    names = {CLIPS // 4: "clips-175", CLIPS // 2: "clips-350", CLIPS: "uni-code"}
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
    lines = {
        text: {size: estimate(results[name], score, AV) for size, name in names.items()}
        for text, score in (("clips", clips), ("segments (F1)", segments))
    }
    figures.plot_sizes(image, label, lines)
    lines["codes shared"] = {
        size: estimate(results[name], shared_codes, ()) for size, name in names.items()
    }
    rows = [[text, *(f"{x:.2f}" for x in line.values())] for text, line in lines.items()]
    body = table((label, *map(str, names)), rows)
    return f"{body}\n\n![Scores over the number of {label}]({image.name})"


def _codes(results: Results, docs: Path) -> str:
    parts = []
    for name, text in (("baseline", "Baseline"), ("cmcm", "CMCM"), ("uni-code", "Uni-Code")):
        if name in results:
            seed = min(results[name])
            figures.plot_code_map(docs / f"codes-{name}.png", results[name][seed])
            parts.append(f"**{text}** (seed {seed})\n\n![Codes of {text}](codes-{name}.png)")
    return "\n\n".join(("## Fig. 4: modalities of the codes", *parts)) if parts else ""


def _questions(results: Results) -> str:
    rows = []
    for claim in QUESTIONS:
        if _have(results, claim):
            scores: tuple[Score, ...] = (clips, segments, shared_codes)
            found = [contrast(results, claim.weights, score) for score in scores]
            rows.append([claim.text, *(f"{x:+.2f} ({VERDICTS[x.sign]})" for x in found)])
    if not rows:
        return ""
    return f"""## Comparisons that the paper does not have

Differences as above.

{table(("", "clips", "segments (F1)", "codes shared"), rows)}"""


def _modalities(results: Results) -> str:
    """Each direction, by the number of modalities in training."""
    columns = {
        "two": {"av": "uni-code", "at": "at", "vt": "vt"},
        "three": dict.fromkeys(("av", "at", "vt"), "avt"),
        "four": dict.fromkeys(("av", "at", "vt", "ad", "vd", "td"), "avtd"),
    }
    if "avt" not in results:
        return ""
    everything = results.get("avtd", results["avt"])
    rows = []
    for way in directions(next(iter(everything.values()))):
        pair = "".join(sorted((way[0], way.split("->")[1][0]), key="avtd".index))
        cells = [
            f"{estimate(results[names[pair]], score, (way,)):.2f}"
            if names.get(pair) in results
            else ""
            for score in (clips, segments)
            for names in columns.values()
        ]
        rows.append([way.replace("->", "→"), *cells])
    head = [f"{score}, {name}" for score in ("clips", "F1") for name in columns]
    return f"""## Two, three and four modalities

Each direction after training on two modalities (its own), on audio, video and text, and on four.
The fourth modality is a noisy seven-segment display of the digit (`examples/experiments/data.py`).

{table(("", *head), rows)}"""
