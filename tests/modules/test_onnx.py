"""ONNX: onnxruntime computes from an exported model what the quantizer computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from support import uniform
from torch import Tensor, nn

from mmvq import MultiModalEMAQuantizer
from mmvq.onnx import decompositions, export, translation_table

D, L = 5, 23

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own


def quantizer(dtype: torch.dtype = torch.float32) -> MultiModalEMAQuantizer:
    """A trained quantizer whose codes lie on a lattice and partly repeat: many exact ties."""
    module = MultiModalEMAQuantizer(D, L, ("audio", "video")).to(dtype)
    module({m: uniform(8, 10, D, dtype=dtype, seed=i) for i, m in enumerate(module.modalities)})
    codes = module.ema_codebook.codes
    codes.copy_((4 * codes).round() / 4)
    codes[20:] = codes[[3, 3, 7]]
    return module


def rows(number: int, module: MultiModalEMAQuantizer) -> Tensor:
    x = (4 * uniform(number, D, seed=9)).round() / 4 + 0.125 * (torch.arange(number) % 2)[:, None]
    x = x.to(module.codebook.dtype)
    if number > L:
        x[:L] = module.codebook
        x[L], x[L + 1, 0], x[L + 2, 1] = torch.nan, torch.inf, -torch.inf
    return x


def run(path: Path, name: str, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {name: x.numpy()})
    return torch.from_numpy(np.asarray(out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_onnxruntime_finds_the_same_codes(dtype: torch.dtype, tmp_path: Path) -> None:
    """For any number of rows, with ties, repeated codes and rows that are not finite."""
    module = quantizer(dtype)
    export(module, tmp_path / "encode.onnx")
    export(module, tmp_path / "decode.onnx", "decode")
    assert module.training
    assert {path.name for path in tmp_path.iterdir()} == {"encode.onnx", "decode.onnx"}
    for number in (0, 1, 2, 7, 300):
        x = rows(number, module)
        indices = run(tmp_path / "encode.onnx", "x", x)
        assert indices.dtype == torch.long
        assert torch.equal(indices, module.encode(x))
        indices[1::3] = -1
        codes = run(tmp_path / "decode.onnx", "indices", indices)
        assert codes.dtype == dtype
        assert torch.equal(codes, module.decode(indices))
    distances = (rows(300, module)[:, None] - module.codebook[:20]).square().sum(-1)
    best = distances.min(1, keepdim=True).values
    assert ((distances == best).sum(1) > 1).sum() > 20  # ties that are no copies


def test_a_code_that_is_not_finite_is_never_chosen(tmp_path: Path) -> None:
    module = quantizer()
    module.ema_codebook.codes[[0, 3, 22]] = torch.tensor([[torch.nan], [torch.inf], [-torch.inf]])
    x = rows(300, quantizer())
    export(module, tmp_path / "encode.onnx")
    found = run(tmp_path / "encode.onnx", "x", x)
    assert torch.equal(found, module.encode(x))
    finite = x.isfinite().all(1)
    assert not torch.isin(found[finite], torch.tensor([0, 3, 22])).any()
    assert (found[~finite] == 0).all()
    module.ema_codebook.codes.fill_(torch.nan)
    export(module, tmp_path / "encode.onnx")
    assert (run(tmp_path / "encode.onnx", "x", x) == 0).all()


class Model(nn.Module):
    """An encoder whose features are quantized."""

    def __init__(self, quantizer: MultiModalEMAQuantizer) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, D)
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        quantized, indices, _ = self.quantizer({"audio": self.encoder(x)})
        return quantized["audio"], indices["audio"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracing_the_search_names_an_exporter(tmp_path: Path) -> None:
    model, x = Model(quantizer()).eval(), torch.zeros(2, 2, 3)
    for record in (
        lambda: torch.jit.trace(model, x),
        lambda: torch.jit.trace(lambda x: model.quantizer.encode(x), torch.zeros(2, D)),
        lambda: torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=False),
    ):
        with pytest.raises(RuntimeError, match=r"nearest_code: (.|\n)*torch\.export"):
            record()


def by_decompositions(model: nn.Module, x: Tensor, path: Path, **options: Any) -> None:
    program = torch.export.export(model, (x,), **options)
    torch.onnx.export(program.run_decompositions(decompositions()), (), path, verbose=False)


def by_translation_table(model: nn.Module, x: Tensor, path: Path, **options: Any) -> None:
    with pytest.warns(DeprecationWarning, match=r"by mmvq\.onnx\.decompositions"):
        table = translation_table()
    options |= {"custom_translation_table": table, "dynamo": True}
    torch.onnx.export(model, (x,), path, verbose=False, **options)


@pytest.mark.parametrize("write", [by_decompositions, by_translation_table])
def test_a_model_around_a_quantizer(write: Callable[..., None], tmp_path: Path) -> None:
    model, path = Model(quantizer()).eval(), tmp_path / "model.onnx"
    free = {0: torch.export.Dim("clips"), 1: torch.export.Dim("segments")}
    with patch.dict(torch._decomp.decomposition_table):
        write(model, torch.zeros(2, 2, 3), path, dynamic_shapes=(free,))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = uniform(7, 4, 3).float()
    quantized, indices = map(torch.from_numpy, session.run(None, {"x": x.numpy()}))
    expected = model(x)
    assert torch.equal(indices, expected[1])
    assert torch.equal(quantized, expected[0])


def test_codes_that_differ_by_little_beside_a_large_one_stay_apart(tmp_path: Path) -> None:
    codes = torch.cat([1e-3 * uniform(30, D, dtype=torch.float32), torch.full((1, D), 1e14)])
    module = MultiModalEMAQuantizer(D, 31, ("a",), init="uniform")
    module.set_codes(codes)
    path = tmp_path / "apart.onnx"
    export(module, path)
    assert run(path, "x", codes[:30]).tolist() == list(range(30))
