"""The tables of other data sets, segmentation, retrieval and follow-ups in the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os.path import relpath
from pathlib import Path
from typing import Any

import numpy as np

from .matrix import EVALUATED, TASK_SEEDS
from .paper import OTHER_SETS, RETRIEVAL, SEGMENTATION, Row
from .results import Estimate, Results
from .tables import comparison, paragraph, title

Read = Callable[[Mapping[str, Any]], float]  # a number from "tasks" of a result


@dataclass(frozen=True)
class TaskTable:
    """A table of the paper.

    Attributes:
        title: Title of its section.
        text: Text about the comparison and the numbers.
        tasks: Tasks that the columns are from.
        columns: Name of a column -> function that reads its number.
        paper: Numbers of the paper, with columns in the same order.
    """

    title: str
    text: str
    tasks: tuple[str, ...]
    columns: Mapping[str, Read]
    paper: Mapping[str, Row]


def _at(task: str, way: str, score: str) -> Read:
    return lambda tasks: tasks[task][way][score]


def _both_ways(way: str) -> Read:
    """Mean of both ways between the two sets."""
    return lambda tasks: float(np.mean([x[way]["accuracy"] for x in tasks["unpaired"].values()]))


TABLES = (
    TaskTable(
        "Table 3: other data sets",
        "Trained on one rendering and tested on another, with other writers, voices, sentences and "
        "layout. F1 of segments (the paper: from AVE to AVVP), and accuracy for clips of the "
        "classes that two sets share, averaged over both ways (the paper: UCF and VGGSound).",
        ("across_sets", "unpaired"),
        {
            "F1 V→A": _at("across_sets", "video->audio", "segment_f1"),
            "F1 A→V": _at("across_sets", "audio->video", "segment_f1"),
            "clips V→A": _both_ways("video->audio"),
            "clips A→V": _both_ways("audio->video"),
        },
        OTHER_SETS,
    ),
    TaskTable(
        "Table 4: query-based segmentation",
        "A head is trained to segment the number given by the code of one modality, and tested "
        "with the code of another.",
        ("segmentation",),
        {
            "mIoU A→T": _at("segmentation", "audio->text", "miou"),
            "F-score A→T": _at("segmentation", "audio->text", "f_score"),
            "mIoU T→A": _at("segmentation", "text->audio", "miou"),
            "F-score T→A": _at("segmentation", "text->audio", "f_score"),
            "told nothing": _at("segmentation", "audio->text", "chance"),
            "told the class": _at("segmentation", "audio->text", "class"),
        },
        SEGMENTATION,
    ),
    TaskTable(
        "Table 5: retrieval of audio",
        "V→T: trained with video as the query and tested with text. T→V: the reverse.",
        ("retrieval",),
        {
            "R@5 V→T": _at("retrieval", "video->text", "r5"),
            "R@10 V→T": _at("retrieval", "video->text", "r10"),
            "R@5 T→V": _at("retrieval", "text->video", "r5"),
            "R@10 T→V": _at("retrieval", "text->video", "r10"),
            "R@5 at random": _at("retrieval", "video->text", "chance_r5"),
        },
        RETRIEVAL,
    ),
)


def _mean(task: str, key: str) -> Read:
    """Mean over the directions of a task."""

    def read(tasks: Mapping[str, Any]) -> float:
        ways = tasks[task].get("classification", tasks[task])
        return float(np.mean([way[key] for way in ways.values()]))

    return read


FOLLOW_UPS = TaskTable(
    "Follow-ups",
    "Later methods of the same authors (`examples/experiments/followups`), averaged over all "
    "directions: clip accuracy with half of the codes' channels, selected without training or at "
    "random, and the H-score of classifying known classes and rejecting unknown ones, with a "
    "threshold chosen on training clips.",
    ("channels", "open_set"),
    {
        "all channels": _mean("channels", "all"),
        "half, chosen": _mean("channels", "selected"),
        "half, at random": _mean("channels", "random"),
        "H-score": _mean("open_set", "h_score"),
        "same-modality bound": _mean("open_set", "upper_bound"),
        "chance": _mean("open_set", "chance"),
    },
    {},
)


def task_sections(results: Results, folder: Path, docs: Path) -> list[str]:
    """A section for every table with results, Fig. 5 after Table 4, and the follow-ups."""
    sections = [_section(results, table) for table in TABLES]
    sections.insert(2, _pictures(folder, docs))
    sections.append(_section(results, FOLLOW_UPS))
    return [section for section in sections if section]


def _pictures(folder: Path, docs: Path) -> str:
    """The pictures that `--run` wrote beside the results."""
    parts = [
        f"**{title(name)}**\n\n![Masks of {name}]({relpath(path, docs)})"
        for name in EVALUATED["segmentation"]
        for path in sorted(folder.glob(f"masks-{name}.png"))
    ]
    heading = (
        "## Fig. 5: masks\n\nEvenly spaced test frames, each below the number of the query. The "
        "head is trained with codes of the first modality and queried with codes of the second."
    )
    return "\n\n".join([heading, *parts]) if parts else ""


def _section(results: Results, table: TaskTable) -> str:
    rows: dict[str, list[str]] = {}
    for name in EVALUATED[table.tasks[0]]:
        runs = results.get(name, {"runs": {}})["runs"].values()
        found = [run["tasks"] for run in runs if set(table.tasks) <= set(run.get("tasks", ()))]
        if found:
            reads = table.columns.values()
            rows[name] = [f"{Estimate.of([read(x) for x in found]):.2f}" for read in reads]
    if not rows:
        return ""
    columns = tuple(table.columns)
    body = comparison(rows, columns, table.paper, columns[:4] if table.paper else ())
    text = paragraph(f"{table.text} The models are those of the first {TASK_SEEDS} seeds.")
    return f"## {table.title}\n\n{text}\n\n{body}"
