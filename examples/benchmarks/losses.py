"""Time of the pre-training losses, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mmvq

from .timing import exponents, in_turns

B, T, D = 80, 10, 256


def matching(size: int) -> Callable[[], Tensor]:
    """Code matching (L_cmcm) of two modalities with `size` codes."""
    z = {m: torch.randn(B, T, D, requires_grad=True) for m in ("audio", "video")}
    codebook, loss = torch.randn(size, D), mmvq.CrossModalCodeMatchingLoss()
    return lambda: _backward(loss(z, codebook), z.values())


def club(batch: int) -> Callable[[], Tensor]:
    """CLUB of `batch` clips, with all pairs as negatives."""
    x, y = (torch.randn(batch, T, 64, requires_grad=True) for _ in range(2))
    estimator = mmvq.CLUBEstimator(64, 64, 64)
    return lambda: _backward(estimator(x, y), (x, y))


def cpc() -> Callable[[], Tensor]:
    """Cross-CPC of two modalities."""
    z = {m: torch.randn(B, T, D, requires_grad=True) for m in ("audio", "video")}
    module = mmvq.CrossCPC(D)
    return lambda: _backward(module(z).loss, z.values())


def _backward(loss: Tensor, inputs: Any) -> Tensor:
    if not loss.isfinite():
        raise FloatingPointError("the loss is not finite")
    loss.backward()
    for x in inputs:
        assert x.grad is not None
        if not x.grad.isfinite().all():
            raise FloatingPointError("the gradient is not finite")
        x.grad = None
    return loss.detach()


def run(*, quick: bool = False, repeats: int = 5) -> list[dict[str, Any]]:
    """One row for each loss and size."""
    torch.manual_seed(0)
    sizes, batches = ((400,), (64, 256)) if quick else ((400, 8_192, 65_536), (256, 1_024, 4_096))
    calls = {f"L_cmcm, L {size:,}": matching(size) for size in sizes}
    calls |= {f"CLUB, B {batch:,}": club(batch) for batch in batches}
    calls["Cross-CPC"] = cpc()
    return [
        {"loss": name, "ms": in_turns({"mmvq": call}, min(repeats, 3 if "65" in name else repeats))}
        for name, call in calls.items()
    ]


def summary(rows: list[dict[str, Any]], clock: str) -> dict[str, Any]:
    """The exponent of B in the cost of CLUB."""
    points = [
        {"B": float(name.split(" ")[-1].replace(",", "")), "t": row["ms"]["mmvq"][clock]}
        for row in rows
        if (name := str(row["loss"])).startswith("CLUB")
    ]
    return {"CLUB grows as": exponents(points, "t", "B")}
