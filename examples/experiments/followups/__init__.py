"""Later work of the same authors, applied to the same runs.

PYTHONPATH=examples python -m experiments.followups runs/digits
"""

from __future__ import annotations

from cmg.run import Task

from .channels import select_channels
from .open_set import score_open_set

all_followups: dict[str, Task] = {"channels": select_channels, "open_set": score_open_set}
