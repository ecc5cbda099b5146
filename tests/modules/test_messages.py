"""Every error that mmvq and mmvq_kernels raise: its type, where, the rule, and its form.

The cases are in `tests/cases`. The last test reads the sources, so that each `raise` has one.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from cases.arguments import ARGUMENTS
from cases.codebook import CODEBOOK
from cases.compat import COMPAT
from cases.features import FEATURES
from cases.form import Case, both, nan, quantizer, z
from cases.kernels import KERNELS
from cases.losses import LOSSES
from cases.saving import SAVING
from cases.use import USE
from torch import Tensor, nn

import mmvq
import mmvq_kernels as kernels
from mmvq_kernels.messages import message

CASES = ARGUMENTS + FEATURES + CODEBOOK + LOSSES + KERNELS + COMPAT + SAVING + USE


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule.replace(": ", "-"))
def test_message(case: Case) -> None:
    """The rule, then a line of what it got, then a hint."""
    for call in case.calls:
        with pytest.raises(case.kind) as error:
            call()
        assert type(error.value) is case.kind
        text = str(error.value)
        assert re.fullmatch(rf"{re.escape(case.rule)}\.\n  .+: .+\n  Hint: .+\.", text)
        assert case.hint in text


def test_values_are_looked_at_only_when_asked() -> None:
    loss = quantizer()({"audio": nan, "video": z}).loss
    assert loss.isnan()
    with patch.dict(os.environ, MMVQ_CHECK="1"):
        quantizer()(both)  # finite: nothing to say
        quantizer(modalities=("where",))({"where": z})
        masked = torch.zeros(2, 5, dtype=torch.bool)
        quantizer()({"audio": nan}, {"audio": masked})  # padding is never read
    with patch.dict(os.environ, MMVQ_CHECK="0"):
        quantizer()({"audio": nan})


def test_the_form_of_a_message() -> None:
    text = message("f", "x must be y", hint="do z", x=z.to("meta"), name="a", none=None, n=0.5)
    assert text == (
        "f: x must be y.\n  x: float32[2, 5, 4] on meta   name: 'a'   none: None   n: 0.5\n"
        "  Hint: do z."
    )
    text = message("f", "r", hint="h", kind=Tensor, module=nn.Linear(1, 1), many={"a": [z, (1,)]})
    assert "kind: Tensor   module: Linear   many: {'a': [float32[2, 5, 4], (1,)]}\n" in text


def test_every_raise_has_a_case() -> None:
    """Each `raise` statement of the two packages is where one of the cases ends."""
    paths = [
        path
        for package in (mmvq, kernels)
        for path in Path(package.__file__ or "").parent.rglob("*.py")
    ]
    raises = {
        (path.name, path.parent.name, node.lineno)
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise)
    }
    reached = set()
    for kind, call in ((case.kind, call) for case in CASES for call in case.calls):
        with pytest.raises(kind) as error:
            call()
        end = error.traceback[-1]
        path = Path(end.path)
        reached.add((path.name, path.parent.name, end.lineno + 1))
    assert raises == reached
