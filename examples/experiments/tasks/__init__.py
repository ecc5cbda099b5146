"""The downstream tasks of the paper, each a function from a finished run to numbers."""

from __future__ import annotations

from cmg.run import Task

from .across_sets import localize_across
from .retrieval import retrieve
from .segmentation import segment
from .unpaired import classify_unpaired

all_tasks: dict[str, Task] = {
    "across_sets": localize_across,
    "unpaired": classify_unpaired,
    "segmentation": segment,
    "retrieval": retrieve,
}
