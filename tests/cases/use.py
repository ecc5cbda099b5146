"""The monitor, figures of use, pictures and old names."""

from __future__ import annotations

import sys
from unittest.mock import patch

from cases.form import anything, codes, of_each, quantizer, refused, whole, z
from torch import nn

import mmvq
from mmvq.functional import code_agreement, code_usage


def without_matplotlib() -> object:
    with patch.dict(sys.modules, {"matplotlib.figure": None}):
        return mmvq.figures.plot_usage({})


USE = [
    refused(
        AttributeError,
        "mmvq.functional: the module has no attribute 'nope'",
        lambda: mmvq.functional.nope,
    ),
    refused(
        TypeError,
        "CodebookMonitor: quantizer must be a MultiModalEMAQuantizer",
        lambda: mmvq.CodebookMonitor(nn.Linear(4, 4)),  # type: ignore[arg-type]
    ),
    refused(
        TypeError,
        "CodebookMonitor: log must be a callable (name, value, step), a SummaryWriter, or None",
        lambda: mmvq.CodebookMonitor(quantizer(), "runs"),  # type: ignore[arg-type]
    ),
    refused(
        TypeError,
        "CodebookMonitor: club must be or hold a CLUBEstimator",
        lambda: mmvq.CodebookMonitor(quantizer(), club=nn.Linear(4, 4)),
    ),
    refused(
        ValueError,
        "CodebookMonitor: every must be an int of at least 1",
        lambda: mmvq.CodebookMonitor(quantizer(), every=0),
    ),
    refused(
        ValueError,
        "code_agreement: the indices of all modalities must have the same shape [B, T]",
        lambda: code_agreement({"audio": whole.long(), "video": whole[:1].long()}),
    ),
    refused(
        ValueError,
        "code_usage: counts must map one or more modalities to tensors [L], with the same L",
        *of_each(
            code_usage,
            *({}, {"audio": whole, "video": whole}, {"a": codes[0], "b": z[0, 0, :3]}),
        ),
    ),
    refused(
        TypeError,
        "plot_codes: counts must map one or more modalities to tensors [L]",
        *of_each(
            lambda given: mmvq.figures.plot_codes(codes, given), anything or quantizer().usage(), {}
        ),
    ),
    refused(
        ValueError,
        "settle_averaged: averaged and newest must hold as many codebooks",
        lambda: mmvq.averaging.settle_averaged(quantizer(), nn.Linear(4, 4)),
    ),
    refused(
        ImportError,
        "mmvq.figures: pictures need matplotlib, which is not installed",
        without_matplotlib,
    ),
]
