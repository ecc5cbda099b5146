"""The claims in the report: a table, a picture, what does not repeat, and every difference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from . import figures
from .claims import CLAIMS, REASONS, SCORES, SHARING, Claim, have
from .paper import paper_contrast
from .results import VERDICTS, Estimate, Results, contrast, shared
from .tables import paragraph, table


def claim_sections(results: Results, docs: Path) -> list[str]:
    """The sections on claims; claims whose experiments were not run are left out."""
    found = {
        group: {
            claim: [contrast(results, claim.weights, score) for score in SCORES.values()]
            for claim in claims
            if have(results, claim)
        }
        for group, claims in CLAIMS.items()
    }
    found = {group: claims for group, claims in found.items() if claims}
    if not found:
        return []
    figures.plot_claims(docs / "claims.png", found)
    rows = [[group, *_verdicts(claims.values())] for group, claims in found.items()]
    rows.append(["**all**", *_verdicts(x for claims in found.values() for x in claims.values())])
    meanings = "\n".join(f'- "{verdict}": {text}.' for verdict, text in VERDICTS.items())
    head = ("claim of the paper", "clips", "segments (F1)")
    return [
        f"""## Which claims are reproduced

{table(head, rows)}

Each claim is tested as a set of differences expected to be positive: between two systems, or with
and without a part.

{meanings}

With so many intervals at 95%, a few verdicts are wrong by chance.

![Every difference with its interval](claims.png)""",
        _not_repeated(found),
        _differences(results, found),
    ]


Found = dict[str, dict[Claim, list[Estimate]]]  # group -> claim -> difference in each score


def marked(verdict: str) -> str:
    """A verdict in Markdown: what is against the paper is bold."""
    return f"**{verdict}**" if verdict == "no" else verdict


def _verdicts(claims: Iterable[Sequence[Estimate]]) -> list[str]:
    """The number of each verdict by score, such as `4 yes, 1 open`."""
    cells = []
    for differences in zip(*claims, strict=True):
        found = [x.verdict for x in differences]
        counts = {marked(verdict): found.count(verdict) for verdict in VERDICTS}
        cells.append(", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n))
    return cells


def _not_repeated(found: Found) -> str:
    """What is not a "yes" for clips, with a reason."""
    parts = []
    for group, claims in found.items():
        others = [f"{c.text} ({x[0].verdict})" for c, x in claims.items() if x[0].verdict != "yes"]
        if others:
            text = f"**{group}.** For clips: {'; '.join(others)}. {REASONS.get(group, '')}"
            parts.append(paragraph(text))
    if not parts:
        return ""
    note = "The reasons are guesses from the tables below; none was tested by itself."
    return "\n\n".join(("## What does not repeat, and why it might not", note, *parts))


def _differences(results: Results, found: Found) -> str:
    rows: list[Sequence[str]] = []
    for group, claims in found.items():
        rows.append([f"**{group}**", *[""] * 6])
        for claim, ours in claims.items():
            theirs = [f"{x:+.1f}" for x in paper_contrast(claim.in_paper) or ()] or ["", ""]
            cells = [[f"{x:+.2f}", marked(x.verdict), y] for x, y in zip(ours, theirs, strict=True)]
            rows.append([claim.text, *cells[0], *cells[1]])
    sharing = [
        f"- {claim.text}: {difference:+.2f}, {marked(difference.verdict)}"
        for claim in SHARING
        if have(results, claim)
        for difference in [contrast(results, claim.weights, shared)]
    ]
    codes = ["Differences in the share of shared codes (Fig. 4):", "\n".join(sharing)]
    head = ("claim", "clips", "", "the paper", "segments (F1)", "", "the paper")
    text = f"""## Every difference

"A over B" is the score of A minus that of B with the same seed, averaged over the directions. The
score is accuracy for clips and F1 for event segments. The paper's differences are of single runs,
in percentage points (mean of both directions, 40K clips unless the claim is about their number).

{table(head, rows)}"""
    return "\n\n".join([text, *(codes if sharing else [])])
