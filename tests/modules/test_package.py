"""The packages as a whole: public names, layers, and what they need to be imported."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import run_python

import mmvq
import mmvq_kernels

REQUIRED = inspect.Parameter.empty
PUBLIC = [
    "CLUBEstimator",
    "CPCOutput",
    "CodeUsage",
    "CodebookMonitor",
    "CrossCPC",
    "CrossModalCodeMatchingLoss",
    "CrossModalCommitmentLoss",
    "EMACodebook",
    "HealthWarning",
    "MultiModalEMAQuantizer",
    "QuantizerOutput",
    "averaging",
    "figures",
    "functional",
    "update_codebooks",
]
KERNELS = [
    "Backend",
    "available_backends",
    "code_log_probabilities",
    "code_statistics",
    "ema_update_",
    "nearest_code",
    "reason_unavailable",
]
# the arguments that may be passed by position, then those by name, each with its default
SIGNATURES: dict[Callable[..., Any], tuple[dict[str, Any], dict[str, Any]]] = {
    mmvq.EMACodebook: (
        {"dim": REQUIRED, "codebook_size": REQUIRED},
        {
            "decay": 0.99,
            "eps": 1e-5,
            "groups": 1,
            "update_from": None,
            "reset_after": None,
            "reset_rule": "all",
            "init": "uniform",
            "process_group": None,
        },
    ),
    mmvq.EMACodebook.search: ({"self": REQUIRED, "x": REQUIRED}, {}),
    mmvq.EMACodebook.accumulate: (
        {"self": REQUIRED, "values": REQUIRED, "indices": REQUIRED, "groups": None},
        {},
    ),
    mmvq.EMACodebook.apply: ({"self": REQUIRED, "fn": None}, {}),
    mmvq.MultiModalEMAQuantizer: (
        {"dim": REQUIRED, "codebook_size": REQUIRED, "modalities": ("audio", "video")},
        {
            "decay": 0.99,
            "eps": 1e-5,
            "partner": "attention",
            "partner_weight": 0.5,
            "partner_temperature": None,
            "assignment": "own",
            "update_from": None,
            "reset_after": 100,
            "reset_rule": "all",
            "init": "kmeans",
            "commitment": "default",
            "gradient": "straight_through",
            "update": "auto",
            "process_group": None,
        },
    ),
    mmvq.MultiModalEMAQuantizer.forward: (
        {"self": REQUIRED, "features": REQUIRED, "masks": None},
        {"freeze": False},
    ),
    mmvq.MultiModalEMAQuantizer.encode: ({"self": REQUIRED, "x": REQUIRED}, {}),
    mmvq.MultiModalEMAQuantizer.decode: ({"self": REQUIRED, "indices": REQUIRED}, {}),
    mmvq.MultiModalEMAQuantizer.usage: ({"self": REQUIRED}, {"reset": False}),
    mmvq.MultiModalEMAQuantizer.update_codebook: ({"self": REQUIRED}, {}),
    mmvq.update_codebooks: ({"modules": REQUIRED}, {}),
    mmvq.CrossModalCommitmentLoss: ({"beta": 0.25, "cross_ratio": 0.5, "reduction": "mean"}, {}),
    mmvq.CrossModalCommitmentLoss.forward: (
        {"self": REQUIRED, "features": REQUIRED, "codes": REQUIRED, "masks": None},
        {},
    ),
    mmvq.CrossModalCodeMatchingLoss: ({}, {"gather": False, "process_group": None}),
    mmvq.CrossModalCodeMatchingLoss.forward: (
        {"self": REQUIRED, "features": REQUIRED, "codebook": REQUIRED, "masks": None},
        {},
    ),
    mmvq.functional.code_probabilities: (
        {"x": REQUIRED, "codebook": REQUIRED, "mask": None},
        {},
    ),
    mmvq.functional.info_nce: (
        {"query": REQUIRED, "key": REQUIRED},
        {
            "mask": None,
            "temperature": 1.0,
            "normalize": False,
            "symmetric": False,
            "reduction": "mean",
            "batch": mmvq.functional.WHOLE,
        },
    ),
    mmvq.CLUBEstimator: (
        {"x_dim": REQUIRED, "y_dim": REQUIRED, "hidden_dim": 256},
        {"negatives": "all", "logvar_bound": 8.0, "gather": False, "process_group": None},
    ),
    mmvq.CLUBEstimator.forward: (
        {"self": REQUIRED, "x": REQUIRED, "y": REQUIRED, "mask": None},
        {"generator": None},
    ),
    mmvq.CLUBEstimator.penalty: (
        {"self": REQUIRED, "x": REQUIRED, "y": REQUIRED, "mask": None},
        {},
    ),
    mmvq.CLUBEstimator.log_likelihood: (
        {"self": REQUIRED, "x": REQUIRED, "y": REQUIRED, "mask": None},
        {},
    ),
    mmvq.CLUBEstimator.learning_loss: (
        {"self": REQUIRED, "x": REQUIRED, "y": REQUIRED, "mask": None},
        {},
    ),
    mmvq.CodebookMonitor: (
        {"quantizer": REQUIRED, "log": None},
        {"every": 100, "club": None},
    ),
    mmvq.CodebookMonitor.step: ({"self": REQUIRED}, {}),
    mmvq.CodebookMonitor.read: ({"self": REQUIRED}, {}),
    mmvq.figures.plot_codes: ({"codebook": REQUIRED, "counts": REQUIRED}, {}),
    mmvq.figures.plot_usage: ({"history": REQUIRED}, {}),
    mmvq.functional.code_agreement: ({"indices": REQUIRED}, {}),
    mmvq.CrossCPC: (
        {"dim": REQUIRED, "modalities": ("audio", "video")},
        {
            "context_dim": None,
            "num_layers": 1,
            "num_steps": 1,
            "first_step": 1,
            "min_context": 1,
            "self_weight": 0.0,
            "normalize_over": "targets",
            "temperature": 1.0,
            "normalize": False,
            "gather": False,
            "process_group": None,
        },
    ),
    mmvq.CrossCPC.forward: (
        {"self": REQUIRED, "features": REQUIRED, "masks": None},
        {"start": None, "generator": None},
    ),
    mmvq_kernels.nearest_code: (
        {"x": REQUIRED, "codebook": REQUIRED},
        {"backend": "auto", "precision": "exact"},
    ),
    mmvq_kernels.code_statistics: (
        {"values": REQUIRED, "indices": REQUIRED, "num_codes": REQUIRED},
        {"groups": None, "num_groups": 1, "deterministic": True, "backend": "auto"},
    ),
    mmvq_kernels.ema_update_: (
        {
            "codes": REQUIRED,
            "sums": REQUIRED,
            "counts": REQUIRED,
            "batch_sums": REQUIRED,
            "batch_counts": REQUIRED,
        },
        {"decay": REQUIRED, "eps": 1e-5, "dead": None, "replacement": None, "backend": "auto"},
    ),
    mmvq_kernels.reason_unavailable: ({"backend": REQUIRED}, {}),
    mmvq_kernels.available_backends: ({}, {}),
}


def files(package: Any) -> list[Path]:
    return sorted(Path(package.__file__).parent.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_public_names() -> None:
    assert mmvq.__all__ == PUBLIC
    assert mmvq_kernels.__all__ == KERNELS
    for package in (mmvq, mmvq_kernels, mmvq.functional):
        assert all(hasattr(package, name) for name in package.__all__)
    assert mmvq.QuantizerOutput._fields == ("quantized", "indices", "loss")
    assert mmvq.CPCOutput._fields == ("loss", "accuracy")
    assert mmvq.CodeUsage._fields == ("counts", "perplexity", "shared", "dead")


@pytest.mark.parametrize("call", SIGNATURES, ids=lambda call: call.__qualname__)
def test_signatures(call: Callable[..., Any]) -> None:
    parameters = inspect.signature(call).parameters.values()
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    keyword = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert len(positional) + len(keyword) == len(parameters)
    for found, expected in zip((positional, keyword), SIGNATURES[call], strict=True):
        assert list(found.items()) == list(expected.items())


@pytest.mark.parametrize(
    "kind",
    [
        mmvq.MultiModalEMAQuantizer,
        mmvq.CrossCPC,
        mmvq.CLUBEstimator,
        mmvq.CrossModalCommitmentLoss,
        mmvq.CrossModalCodeMatchingLoss,
    ],
)
def test_a_call_has_the_types_of_forward(kind: type) -> None:
    """To a type checker: `nn.Module` gives a call none."""
    tree = ast.parse(inspect.getsource(kind))
    found = {
        node.name: (ast.dump(node.args), ast.dump(node.returns or ast.Pass()))
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    assert found["__call__"] == found["forward"]


def test_every_public_name_is_documented() -> None:
    for package in (mmvq, mmvq_kernels, mmvq.functional):
        for name in package.__all__:
            value = getattr(package, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                text = value.__doc__ or ""
                assert text, f"{name} has no docstring"
                # what a function returns or raises shows in the example of that function
                result = isinstance(value, type) and issubclass(value, tuple | Exception)
                assert result or ">>>" in text, f"{name} has no example"


def test_layers_import_downwards() -> None:
    """Modules -> functional -> mmvq_kernels, and compat only from outside."""
    root = Path(mmvq.__file__).parent
    for path in files(mmvq_kernels):
        assert not [name for name in imports(path) if name.split(".")[0] == "mmvq"], path
    for path in files(mmvq):
        inside = [name for name in imports(path) if name.split(".")[0] == "mmvq"]
        layer = path.relative_to(root).parts[0]
        if layer == "functional":
            assert all(name.startswith("mmvq.functional") for name in inside), path
        elif layer != "compat":
            assert not [name for name in inside if name.startswith("mmvq.compat")], path
    talkers = {path.name for path in files(mmvq) if "dist.all_" in path.read_text()}
    assert talkers == {"distributed.py"}


WITHOUT = """
import sys

missing = dict.fromkeys(["triton", "sklearn", "matplotlib", "safetensors", "tqdm", "scipy",
                         "hypothesis", "huggingface_hub", "vector_quantize_pytorch"])
sys.modules.update(missing)  # as if not installed: found nowhere, and an import raises
import mmvq, mmvq.compat.cmg, mmvq.compat.vector_quantize_pytorch, torch
quantizer = mmvq.MultiModalEMAQuantizer(4, 8)
quantizer({"audio": torch.randn(2, 3, 4), "video": torch.randn(2, 3, 4)}).loss
assert missing.items() <= sys.modules.items()
"""


def test_works_without_the_optional_packages() -> None:
    run_python("-W", "error", "-c", WITHOUT, timeout=120)


def test_both_packages_are_typed() -> None:
    assert all(Path(p.__file__).with_name("py.typed").exists() for p in (mmvq, mmvq_kernels))
