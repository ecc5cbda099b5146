"""What a call must say when it fails, and the words that many have in common."""

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


@dataclass(frozen=True)
class Case:
    """A call, and all that it must say."""

    call: Callable[[], object]
    kind: type[Exception]
    rule: str
    came: str
    hint: str

    @property
    def text(self) -> str:
        return f"{self.rule}.\n  {self.came}\n  Hint: {self.hint}."


def quantizer(**options: Any) -> mmvq.MultiModalEMAQuantizer:
    return mmvq.MultiModalEMAQuantizer(4, 8, **options)


def checked(call: Callable[[], object]) -> Callable[[], object]:
    """The call under MMVQ_CHECK=1."""

    def run() -> object:
        with patch.dict(os.environ, MMVQ_CHECK="1"):
            return call()

    return run


def number(where: str, name: str, span: str, came: str, call: Callable[[], object]) -> Case:
    rule = f"{where}: {name} must be a finite number {span}"
    return Case(call, ValueError, rule, f"{name}: {came}", f"pass a number {span}")


def integer(where: str, name: str, low: int, came: str, call: Callable[[], object]) -> Case:
    rule = f"{where}: {name} must be an int of at least {low}"
    return Case(call, ValueError, rule, f"{name}: {came}", f"pass a Python int, {low} or more")


def choice(where: str, name: str, choices: str, call: Callable[[], object]) -> Case:
    rule = f"{where}: {name} must be one of {choices}"
    return Case(call, ValueError, rule, f"{name}: 'x'", "pick one")


def finite(where: str, call: Callable[[], object], name: str = "audio") -> Case:
    hint = "look for a division by zero or an overflow upstream"
    came = f"{name}: float32[2, 5, 4]"
    return Case(checked(call), ValueError, f"{where}: {name} must be finite", came, hint)
