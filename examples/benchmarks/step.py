"""Time of a training step: forward, backward, moving average, reset and commitment loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mmvq

from . import peers
from .search import compare
from .timing import Call, in_turns

B, T, D, L = 80, 10, 256, 400
NAMES = ("audio", "video")


def run(*, quick: bool = False, repeats: int = 30, device: str = "cpu") -> list[dict[str, Any]]:
    """Time a step: two modalities in mmvq, both as one batch in vector-quantize-pytorch."""
    batch, size = (8, 50) if quick else (B, L)
    torch.manual_seed(0)
    z = {m: torch.randn(batch, T, D, device=device, requires_grad=True) for m in NAMES}
    together = torch.cat([x.detach() for x in z.values()]).requires_grad_()  # [2 B, T, D]
    flow = torch.randn_like(together)  # gradient from the decoder
    flows = dict(zip(NAMES, flow.chunk(2), strict=True))
    quantizer = mmvq.MultiModalEMAQuantizer(D, size, NAMES).to(device)
    quantizer(z)  # k-means start

    def ours() -> None:
        q, _, loss = quantizer(z)
        torch.autograd.backward([loss, *q.values()], [None, *flows.values()])
        for x in z.values():
            x.grad = None

    rows = together.detach().flatten(0, 1)
    calls: dict[str, Call] = {
        "mmvq": ours,
        "product": lambda: peers.product(rows, quantizer.codebook),
    }
    if peers.find("vector_quantize_pytorch"):
        theirs = peers.quantizer(D, size).to(device)
        _same_codes(theirs, quantizer.codebook, together)

        def step() -> None:
            q, _, loss = theirs(together)
            torch.autograd.backward([loss.sum(), q], [None, flow])
            together.grad = None

        calls["vector-quantize-pytorch"] = step
    times = in_turns(calls, repeats, device=device)
    return [{"B": batch, "T": T, "D": D, "L": size, "modalities": 2, "ms": times}]


def _same_codes(theirs: Any, codes: Tensor, x: Tensor) -> None:
    theirs._codebook.embed.copy_(codes[None])
    theirs._codebook.embed_avg.copy_(codes[None])
    theirs._codebook.cluster_size.fill_(10)
    theirs.eval()
    with torch.no_grad():
        index = theirs(x)[1].flatten()
    theirs.train()
    rows = x.detach().flatten(0, 1)
    chosen = {"mmvq": mmvq.functional.nearest_code(rows, codes), "vector-quantize-pytorch": index}
    compare(rows, codes, chosen)
