"""What version 1 saved: every later version loads it, and answers as that one did.

Values may differ by rounding only: each comes from chains of at most 1000 float32 operations on
numbers below 8. Indices, counts of choices and ages are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from golden.make_state import NAMES, answers
from safetensors.torch import load_file
from support import close, rounding
from torch import nn

import mmvq
from mmvq.pretrained import Pretrained

FOLDER = Path(__file__).with_name("state")
CLASSES: dict[str, type[Pretrained]] = {
    "quantizer": mmvq.MultiModalEMAQuantizer,
    "cpc": mmvq.CrossCPC,
    "club": mmvq.CLUBEstimator,
}


def from_folders() -> dict[str, Pretrained]:
    return {name: kind.from_pretrained(FOLDER / name) for name, kind in CLASSES.items()}


def from_state_dicts() -> dict[str, nn.Module]:
    loss = mmvq.CrossModalCommitmentLoss(0.5, {("audio", "video"): 0.25})
    modules = {
        "quantizer": mmvq.MultiModalEMAQuantizer(
            4,
            6,
            NAMES,
            decay=0.9,
            partner="aligned",
            update_from=("audio", "video"),
            reset_after=3,
            commitment=loss,
        ),
        "cpc": mmvq.CrossCPC(4, NAMES, context_dim=3, num_layers=2, num_steps=2),
        "club": mmvq.CLUBEstimator(4, 3, 5),
    }
    saved: Mapping[str, dict[str, torch.Tensor]]
    saved = torch.load(FOLDER / "state.pt", weights_only=True)
    for name, module in modules.items():
        module.load_state_dict(saved[name])
    return modules


@pytest.mark.parametrize("load", [from_folders, from_state_dicts])
def test_version_1_loads_and_answers_as_it_did(load: object) -> None:
    assert callable(load)
    modules = load()
    expected = load_file(FOLDER / "answers.safetensors")
    found = answers(**modules, x=expected["x"])
    assert found.keys() >= expected.keys()
    for name, value in expected.items():
        dtype = torch.long if name.endswith(".initialized") else value.dtype  # it was bool
        assert found[name].dtype == dtype, name
        close(found[name], value, rounding(torch.float32, 1000, 8.0) * value.is_floating_point())


def test_both_files_hold_the_same_tensors() -> None:
    saved = torch.load(FOLDER / "state.pt", weights_only=True)
    for name, state in saved.items():
        tensors = load_file(FOLDER / name / "model.safetensors")
        assert tensors.keys() == state.keys()
        assert all(torch.equal(x, state[key]) for key, x in tensors.items())
        assert state._metadata[""]["version"] == 1
