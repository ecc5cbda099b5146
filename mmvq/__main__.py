"""`python -m mmvq` prints versions, devices and backends, for a bug report."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

import mmvq
from mmvq_kernels import reason_unavailable

_PACKAGES = ("triton", "einops", "numpy", "numba", "safetensors", "huggingface_hub", "onnx")


def report() -> Iterator[tuple[str, str]]:
    """Yield the name and state of each line."""
    yield "mmvq", mmvq.__version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    toolkits = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    toolkit = " ".join(f"{name} {v}" for name, v in toolkits.items() if v) or "no GPU toolkit"
    yield "torch", f"{torch.__version__}, {toolkit}, {torch.get_num_threads()} CPU threads"
    for name in _PACKAGES:
        yield name, _version(name)
    for i in range(torch.cuda.device_count()):
        yield f"GPU {i}", torch.cuda.get_device_name(i)
    for backend in ("torch", "triton"):
        reason = reason_unavailable(backend)
        yield f"backend {backend}", "runs" if reason is None else f"off: {reason}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print("\n".join(f"{name:<16} {state}" for name, state in report()))
