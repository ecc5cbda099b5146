"""Tables in Markdown, with the numbers of the paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from textwrap import fill

from .claims import PARTS, SYSTEMS
from .paper import Row

_NAMES = {"baseline": "Baseline", "uni-code": "Uni-Code", "avt": "full model", **SYSTEMS}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def paragraph(text: str, bullet: str = "") -> str:
    """Wrap text at 120 characters, as a paragraph or behind a bullet."""
    return fill(
        " ".join(text.split()),
        120,
        initial_indent=bullet,
        subsequent_indent=" " * len(bullet),
        break_long_words=False,
        break_on_hyphens=False,
    )


def comparison(
    rows: Mapping[str, Sequence[str]],
    columns: Sequence[str],
    paper: Mapping[str, Row],
    paper_columns: Sequence[str],
) -> str:
    """A table of experiments, with the numbers of the paper if it has any of the rows."""
    known = paper_columns if paper.keys() & rows.keys() else ()
    theirs = [f"paper: {name}" if n == 0 else name for n, name in enumerate(known)]
    lines = [
        [
            title(name),
            *found,
            *map(str, paper.get(name, ())),
            *([""] * len(theirs) if name not in paper else ()),
        ]
        for name, found in rows.items()
    ]
    return table(("", *columns, *theirs), lines)


def title(name: str) -> str:
    """The name of an experiment in tables."""
    name = name.removeprefix("avt-")
    if name.startswith("without-"):
        return f"without {PARTS[name.removeprefix('without-')]}"
    if name.startswith("dcid-"):
        return f"DCID+{SYSTEMS[name.removeprefix('dcid-')]}"
    return _NAMES.get(name, name)
