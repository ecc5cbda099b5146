"""The systems of Table 1. Each file has the objective of one system.

The baseline (Sec. 4.1) and Uni-Code need no file: they are `UniCode` without and with its parts.
"""

from __future__ import annotations

from cmg.model import Config, UniCode

from .base import Alignment, System
from .cmcm import CMCM
from .codis import CODIS
from .mst import MST
from .smit import SMiT
from .turn import TURN

__all__ = ["ALIGNMENTS", "Alignment", "System", "build"]

ALIGNMENTS: dict[str, type[Alignment]] = {
    "s-mit": SMiT,
    "mst": MST,
    "codis": CODIS,
    "turn": TURN,
    "cmcm": CMCM,
}


def build(config: Config, alignment: str | None) -> UniCode:
    """Build Uni-Code without the parts that `config` leaves out, and with an alignment if named."""
    return UniCode(config) if alignment is None else System(config, ALIGNMENTS[alignment])
