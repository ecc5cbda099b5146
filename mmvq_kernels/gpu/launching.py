"""The one way a kernel of ours is launched, so that launches can be counted, recorded, audited."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ASSUMED_PROCESSORS = 132  # where there is no GPU to ask (compile audit, interpreter): an H100's
_ASSUMED_CAPABILITY = 90


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Tensor | float | None, **options: Any
) -> None:
    """Run `kernel[grid](*args, **options)` on the device of the first tensor.

    An empty grid launches nothing.
    """
    if 0 in grid:
        return
    first = next(arg for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device_of(first):
        kernel[grid](*args, **fit(options, amd=amd(first)))


def amd(like: Tensor) -> str | None:
    """Architecture of the AMD GPU that holds `like`; None for other devices."""
    if torch.version.hip is None or like.device.type != "cuda":
        return None
    name: str = torch.cuda.get_device_properties(like.device).gcnArchName
    return name.split(":")[0]


def fit(options: dict[str, Any], *, amd: str | None) -> dict[str, Any]:
    """The options for a vendor; `amd` is the architecture of one of AMD's GPUs.

    Their 64 KB of shared memory hold two stages, their registers 64 codes of a tile. Their matrix
    instructions multiply float32 as it is, so that nothing is split in three. Only gfx942
    multiplies tf32.
    """
    fitted = dict(options)
    if amd is None:
        return fitted
    fitted.pop("maxnreg", None)  # an option of NVIDIA's alone
    if "num_stages" in fitted:
        fitted["num_stages"] = min(fitted["num_stages"], 2)
    if "BLOCK_L" in fitted:  # what a program is given is a multiple of the larger one too
        fitted["BLOCK_L"] = min(fitted["BLOCK_L"], 64)
    precision = fitted.get("PRECISION")
    if precision == "tf32x3" or (precision == "tf32" and amd != "gfx942"):
        fitted["PRECISION"] = "ieee"
    return fitted


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A mask as bytes, which triton can load."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def processors(like: Tensor) -> int:
    """Multiprocessors of the device that holds `like`."""
    if like.device.type != "cuda" or not torch.cuda.is_available():
        return _ASSUMED_PROCESSORS
    return torch.cuda.get_device_properties(like.device).multi_processor_count


def capability(like: Tensor) -> int:
    """Compute capability of the device that holds `like`, 90 for 9.0; of AMD's 0."""
    if like.device.type != "cuda" or not torch.cuda.is_available():
        return _ASSUMED_CAPABILITY
    if torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(like.device)
    return 10 * major + minor


def name(like: Tensor) -> str:
    """What the maker calls the device that holds `like`; empty without one."""
    if like.device.type != "cuda" or not torch.cuda.is_available():
        return ""
    return torch.cuda.get_device_name(like.device)


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)
