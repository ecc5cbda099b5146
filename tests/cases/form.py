"""The form of a case, and the values that many have in common."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

import mmvq

z = torch.zeros(2, 5, 4)
nan = torch.full((2, 5, 4), torch.nan)
codes = torch.zeros(8, 4)
whole: Any = torch.ones(2, 5, dtype=torch.bool)
both = {"audio": z, "video": z}
anything: Any = None

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """Calls that fail for one reason.

    Attributes:
        kind: type of the error.
        rule: what it says first: where, and the rule.
        calls: each raises it.
        hint: a part of the hint, where that depends on the call.
    """

    kind: type[Exception]
    rule: str
    calls: tuple[Call, ...]
    hint: str = ""


def refused(kind: type[Exception], rule: str, *calls: Call, hint: str = "") -> Case:
    return Case(kind, rule, calls, hint)


def quantizer(**options: Any) -> mmvq.MultiModalEMAQuantizer:
    return mmvq.MultiModalEMAQuantizer(4, 8, **options)


def checked(call: Call) -> Call:
    """The call under MMVQ_CHECK=1."""

    def run() -> object:
        with patch.dict(os.environ, MMVQ_CHECK="1"):
            return call()

    return run


def of_each(call: Callable[[Any], object], *values: object) -> list[Call]:
    """One call for each value."""
    return [lambda value=value: call(value) for value in values]
