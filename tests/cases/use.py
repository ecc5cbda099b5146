"""The monitor, figures of use and pictures."""

from __future__ import annotations

import sys
from unittest.mock import patch

from cases.form import Case, anything, codes, quantizer, whole, z
from torch import nn

import mmvq


def without_matplotlib() -> object:
    with patch.dict(sys.modules, {"matplotlib.figure": None}):
        return mmvq.figures.plot_usage({})


USE = [
    Case(
        lambda: mmvq.CodebookMonitor(nn.Linear(4, 4)),  # type: ignore[arg-type]
        TypeError,
        "CodebookMonitor: quantizer must be a MultiModalEMAQuantizer",
        "quantizer: Linear",
        "pass the module itself: not the model around it, and before torch.compile",
    ),
    Case(
        lambda: mmvq.CodebookMonitor(quantizer(), "runs"),  # type: ignore[arg-type]
        TypeError,
        "CodebookMonitor: log must be a callable (name, value, step), a SummaryWriter, or None",
        "log: 'runs'",
        "pass print to try it",
    ),
    Case(
        lambda: mmvq.CodebookMonitor(quantizer(), club=nn.Linear(4, 4)),
        TypeError,
        "CodebookMonitor: club must be or hold a CLUBEstimator",
        "club: Linear",
        "leave it out if there is none to watch",
    ),
    Case(
        lambda: mmvq.CodebookMonitor(quantizer(), every=0),
        ValueError,
        "CodebookMonitor: every must be an int of at least 1",
        "every: 0",
        "pass a Python int, 1 or more",
    ),
    Case(
        lambda: mmvq.functional.code_agreement({"audio": whole.long(), "video": whole[:1].long()}),
        ValueError,
        "code_agreement: the indices of all modalities must have one shape [B, T]",
        "indices: {'audio': int64[2, 5], 'video': int64[1, 5]}",
        "give modalities of one time grid; positions of different grids do not pair",
    ),
    *(
        Case(
            lambda counts=counts: mmvq.functional.code_usage(counts),
            ValueError,
            "code_usage: counts must hold a tensor [L] for each modality, of one L",
            f"counts: {came}",
            "pass quantizer.usage().counts; torch.bincount makes them of indices",
        )
        for counts, came in (
            ({}, "{}"),
            ({"audio": whole, "video": whole}, "{'audio': bool[2, 5], 'video': bool[2, 5]}"),
            ({"a": codes[0], "b": z[0, 0, :3]}, "{'a': float32[4], 'b': float32[3]}"),
        )
    ),
    *(
        Case(
            lambda given=given: mmvq.figures.plot_codes(codes, given),
            TypeError,
            "plot_codes: counts must map one or more modalities to tensors [L]",
            f"counts: {came}",
            "pass quantizer.usage().counts",
        )
        for given, came in ((anything or quantizer().usage(), "CodeUsage"), ({}, "dict"))
    ),
    Case(
        lambda: mmvq.averaging.settle_averaged(quantizer(), nn.Linear(4, 4)),
        ValueError,
        "settle_averaged: averaged and newest must hold as many codebooks",
        "averaged: 1   newest: 0",
        "pass two models of one architecture",
    ),
    Case(
        without_matplotlib,
        ImportError,
        "mmvq.figures: pictures need matplotlib, which is not installed",
        "missing: 'matplotlib.figure'",
        "pip install matplotlib",
    ),
]
