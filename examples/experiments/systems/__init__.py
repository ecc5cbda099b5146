"""The systems of Table 1, each an objective in a file of its own.

The baseline (Sec. 4.1) and Uni-Code itself add nothing: they are `UniCode` with and without parts.
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
    """A model to train: Uni-Code without the parts that `config` leaves out, plus an alignment."""
    return UniCode(config) if alignment is None else System(config, ALIGNMENTS[alignment])
