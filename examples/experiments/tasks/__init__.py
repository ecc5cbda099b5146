"""The paper's downstream tasks, each a function of a finished run that returns plain numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .across_sets import localize_across
from .retrieval import retrieve
from .segmentation import segment
from .unpaired import classify_unpaired
from .within import classify, localize

if TYPE_CHECKING:
    from ..run import Task

all_tasks: dict[str, Task] = {
    "classification": classify,
    "localization": localize,
    "across_sets": localize_across,
    "unpaired": classify_unpaired,
    "segmentation": segment,
    "retrieval": retrieve,
}
