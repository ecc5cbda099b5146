"""`pytest -m gpu` from the root collects where none of the optional packages is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

OPTIONAL = (
    "datasets",
    "faiss",
    "h5py",
    "huggingface_hub",
    "lightning",
    "matplotlib",
    "nbclient",
    "nbformat",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "safetensors",
    "sklearn",
    "tensorboard",
    "tqdm",
    "transformers",
    "vector_quantize_pytorch",
)


@pytest.mark.parametrize("missing", [OPTIONAL, ("matplotlib",)], ids=["all", "one"])
def test_the_gpu_tier_is_collected_without(missing: tuple[str, ...], tmp_path: Path) -> None:
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({missing!r}))\n"
    (tmp_path / "sitecustomize.py").write_text(blocked)
    env = os.environ | {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    # what its own process was given is not for this one
    env = {name: x for name, x in env.items() if name not in ("PYTEST_ADDOPTS", "TRITON_INTERPRET")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "--collect-only",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/kernels/test_gpu.py::test_the_operators_go_to_the_kernels" in done.stdout
    assert "not collected: tests/modules/test_figures.py (needs matplotlib)" in done.stdout
