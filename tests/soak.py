"""Many small steps of a quantizer: memory must not grow, every code must stay in use.

PYTHONPATH=. python tests/soak.py [STEPS]       200,000 if not given; prints the figures
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import mmvq

B, T, D, L = 4, 4, 8, 16
NAMES = ("audio", "video")


class Record(NamedTuple):
    """What was seen at a step.

    Attributes:
        step: how many were made.
        memory: resident memory of the process, in bytes.
        tensors: how many there are.
        perplexity: the lowest of any modality since the record before.
        dead: codes that no modality chose since then.
        finite: whether all of the state is.
    """

    step: int
    memory: int
    tensors: int
    perplexity: float
    dead: int
    finite: bool


def resident() -> int:
    """Resident memory of this process, in bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def soak(steps: int, records: int = 20) -> list[Record]:
    """Train on batches of two modalities that drift, with masks, and one of them missing at times.

    Every step has a forward and a backward pass; every 50th batch holds a NaN.
    """
    torch.manual_seed(0)
    quantizer = mmvq.MultiModalEMAQuantizer(D, L, NAMES, reset_after=50)
    centres = 3 * torch.randn(L, D)
    seen = []
    for step in range(1, steps + 1):
        centres += 0.01 * torch.randn(L, D) - 1e-4 * centres
        events = centres[torch.randint(L, (B, T))]
        z = {name: (events + 0.3 * torch.randn(B, T, D)).requires_grad_() for name in NAMES}
        if step % 50 == 0:
            z["audio"].data[0, 0] = torch.nan
        if step % 7 == 0:
            del z["video"]
        masks = {"audio": torch.rand(B, T) < 0.9}
        quantizer(z, masks).loss.backward()
        if step % max(1, steps // records) == 0:
            usage = quantizer.usage(reset=True)
            seen.append(
                Record(
                    step,
                    resident(),
                    sum(type(x) is torch.Tensor for x in gc.get_objects()),
                    min(float(x) for x in usage.perplexity.values()),
                    int(usage.dead.sum()),
                    all(bool(x.isfinite().all()) for x in quantizer.state_dict().values()),
                )
            )
    return seen


def slope(seen: list[Record]) -> float:
    """Bytes a step by which memory grows, by least squares over all but the first quarter."""
    late = seen[len(seen) // 4 :]
    return float(np.polyfit([r.step for r in late], [r.memory for r in late], 1)[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    seen = soak(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000)
    for record in seen:
        print(*(f"{name} {value:.6g}" for name, value in record._asdict().items()), sep="   ")
    print(f"slope {slope(seen):.3f} bytes a step")
