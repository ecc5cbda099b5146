"""A trained model as an ONNX model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmvq.onnx import decompositions

from .clips import only_valid
from .errors import optional_import
from .files import write_atomic

if TYPE_CHECKING:
    from .trained import TrainedModel


def write_onnx(model: TrainedModel, path: str | Path, modality: str) -> None:
    """Write an ONNX model; see `TrainedModel.export_onnx`."""
    with optional_import("export_onnx", "pip install 'mmvq[onnx]'"):
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    device = model.codebook.device
    features = torch.zeros(2, 3, *model.grid(modality), model.channels(modality), device=device)
    sizes = {0: torch.export.Dim("N"), 1: torch.export.Dim("T")}
    program = torch.export.export(
        _Tokens(model, modality).eval(),
        (features, torch.ones(2, 3, dtype=torch.bool, device=device)),
        dynamic_shapes=(sizes, sizes),
        strict=False,
    )
    exported: Any = torch.onnx.export(
        program.run_decompositions(decompositions()),
        (),
        input_names=["features", "mask"],
        output_names=["tokens"],
        dynamo=True,
        verbose=False,
    )
    write_atomic(path, exported.model_proto.SerializeToString())


class _Tokens(nn.Module):
    """From raw features of a modality to tokens, in operators that ONNX has."""

    def __init__(self, model: TrainedModel, modality: str) -> None:
        super().__init__()
        self.model, self.modality = model, modality

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        z = self.model.encode(self.modality, only_valid(x, mask), mask)
        tokens: Tensor = self.model.quantizer.encode(z)
        return tokens.where(mask, -1)
