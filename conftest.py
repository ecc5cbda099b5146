"""What every test and every example in a docstring finds ready."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import mmvq
import mmvq_kernels

MEDIA = (
    "av",
    "efficientnet_lite_pytorch",
    "pyarrow",
    "pyopen_wakeword",
    "transformers",
    "wordllama",
)
NEEDS = {  # packages of the extras without which these cannot be imported
    "tests/examples": ("matplotlib", "safetensors", "sklearn", "tqdm"),
    "tests/examples/test_decode.py": ("av",),
    "tests/examples/test_digits_media.py": ("av",),
    "tests/examples/test_files_guide.py": (*MEDIA, "onnxruntime"),
    "tests/examples/test_fuzz.py": ("hypothesis",),
    "tests/examples/test_media.py": ("av", "psutil", "pyopen_wakeword"),
    "tests/examples/test_media_encoders.py": MEDIA,
    "tests/examples/test_released.py": ("h5py", "hypothesis"),
    "tests/examples/test_story.py": ("nbclient", "nbformat"),
    "tests/golden/make_state.py": ("safetensors",),
    "tests/golden/test_state.py": ("safetensors",),
    "tests/kernels/columns.py": ("triton",),
    "tests/kernels/interpreter": ("triton",),
    "tests/media_files.py": ("av",),
    "tests/modules/test_figures.py": ("matplotlib",),
    "tests/modules/test_pretrained.py": ("huggingface_hub",),
    "tests/modules/test_vector_quantize_pytorch.py": ("vector_quantize_pytorch",),
    "tests/properties": ("hypothesis",),
    "tests/released_files.py": ("h5py",),
}
MISSING = {path: [n for n in names if find_spec(n) is None] for path, names in NEEDS.items()}
collect_ignore = [path for path, names in MISSING.items() if names]
collect_ignore_glob = ["mmvq_kernels/gpu/*"]  # importing them imports triton


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was asked for and not collected."""
    root = Path(__file__).parent
    asked = [Path(arg.split("::")[0]).resolve() for arg in terminalreporter.config.args]
    for path in collect_ignore:
        if any((root / path).is_relative_to(each) for each in asked):
            terminalreporter.write_line(f"not collected: {path} (needs {', '.join(MISSING[path])})")


@pytest.fixture(autouse=True)
def ready(doctest_namespace: dict[str, object]) -> None:
    """Seed torch; let docstrings use torch and the public names without importing them."""
    torch.manual_seed(0)
    doctest_namespace["torch"] = torch
    for package in (mmvq_kernels, mmvq):
        doctest_namespace.update({name: getattr(package, name) for name in package.__all__})
