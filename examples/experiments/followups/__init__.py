"""What the authors built on the method later, on the same runs.

PYTHONPATH=examples python -m experiments.followups runs/digits
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .channels import select_channels
from .open_set import meet_unknown

if TYPE_CHECKING:
    from ..run import Task

all_followups: dict[str, Task] = {"channels": select_channels, "open_set": meet_unknown}
