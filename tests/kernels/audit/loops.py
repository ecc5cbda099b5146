"""The loops of a kernel's machine code that multiply matrices, and what a pass through them costs.

Whether a kernel that is bound by its instructions gets faster shows here without a GPU.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LINE = re.compile(r"^\s*(?:/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;|(\.L\w+):)", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L\w+)\)")
_WAIT = re.compile(r"\bBAR\.SYNC|\bDEPBAR\.LE|TRYWAIT")
_OF_GROUP = re.compile(r"\b[A-Z]GMMA\.(\d+)x(\d+)x(\d+)")  # of four warps
_OF_WARP = re.compile(r"\b[A-Z]MMA\.(16)(8)(\d+)")


class Loop(NamedTuple):
    """A pass of one warp through a loop, without the loops inside it that multiply too."""

    instructions: int
    multiply_adds: int  # by matrix instructions: a warp has a quarter of those of its group
    waits: int  # for other warps, copies or products
    skipped: int = 0  # of the instructions, those that a branch may pass over

    @property
    def per_thousand(self) -> float:
        """Instructions for 1,000 multiply-adds."""
        return 1000 * self.instructions / self.multiply_adds


def loops(code: str) -> list[Loop]:
    """Those that multiply, from what nvdisasm prints; an inner loop before the loop around it."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for text, label in _LINE.findall(code):
        if label:
            labels[label] = len(lines)
        else:
            lines.append(text)
    jumps = [(i, labels[m[1]]) for i, line in enumerate(lines) if (m := _BRANCH.search(line))]
    ends = {to: i + 1 for i, to in jumps if to <= i}  # where a loop begins -> its last branch back
    own = [(_multiply_adds(line), _WAIT.search(line) is not None) for line in lines]
    spans = [span for span in ends.items() if any(products for products, _ in own[slice(*span)])]
    found = []
    for start, end in sorted(spans, key=lambda span: span[1] - span[0]):
        inner = {i for a, b in spans if start <= a and b < end for i in range(a, b)}
        passed = [i for i in range(start, end) if i not in inner]
        past = {j for i, to in jumps if start <= i < to < end for j in range(i + 1, to)}
        products, waits = (sum(column) for column in zip(*(own[i] for i in passed), strict=True))
        found.append(Loop(len(passed), products, waits, len(past.intersection(passed))))
    return found


def _multiply_adds(line: str) -> int:
    for pattern, warps in ((_OF_GROUP, 4), (_OF_WARP, 1)):
        if match := pattern.search(line):
            m, n, k = map(int, match.groups())
            return m * n * k // warps
    return 0
