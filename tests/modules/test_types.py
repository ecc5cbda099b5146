"""What a type checker sees: a call has the types of `forward`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CODE = """
import mmvq
import torch

x = torch.ones(2, 3, 4)
z = {"audio": x, "video": x}
reveal_type(mmvq.MultiModalEMAQuantizer(4, 8)(z, freeze=True))
reveal_type(mmvq.MultiModalEMAQuantizer(4, 8)(z).indices)
reveal_type(mmvq.CrossCPC(4)(z, start="all").accuracy)
reveal_type(mmvq.CLUBEstimator(4, 4)(x, x))
reveal_type(mmvq.CrossModalCommitmentLoss()(z, z))
reveal_type(mmvq.CrossModalCodeMatchingLoss()(z, x[0]))
reveal_type(mmvq.MultiModalEMAQuantizer(4, 8).decay)
reveal_type(mmvq.EMACodebook(4, 8).reset_after)
"""
SEEN = [
    "tuple[dict[str, Tensor], dict[str, Tensor], Tensor, fallback=QuantizerOutput]",
    "dict[str, Tensor]",
    "dict[tuple[str, str], Tensor]",
    "Tensor",
    "Tensor",
    "Tensor",
    "float",
    "int | None",
]


def test_a_call_is_typed(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    (tmp_path / "use.py").write_text(CODE)
    out, errors, status = api.run(["--no-error-summary", str(tmp_path / "use.py")])
    assert status == 0, out + errors
    found = re.findall(r'Revealed type is "(.*)"', out)
    assert [re.sub(r"[\w.]+\.", "", each) for each in found] == SEEN
