"""A codebook trained with the real vector-quantize-pytorch, moved into a quantizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import close, rounding
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

from mmvq.compat import vector_quantize_pytorch

L, D = 31, 8
STEPS = 10


def trained(**settings: Any) -> VectorQuantize:
    module = VectorQuantize(D, L, **settings)
    for _ in range(20):
        module(torch.randn(4, 20, D))
    return module


SOURCES: dict[str, Callable[[VectorQuantize], Any]] = {
    "module": lambda module: module,
    "its codebook": lambda module: module._codebook,
    "its state": lambda module: module.state_dict(),
    "its codebook's state": lambda module: module._codebook.state_dict(),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("threshold", [0, 2])
def test_same_indices_same_codes(source: Callable[..., Any], threshold: int) -> None:
    theirs = trained(kmeans_init=True, threshold_ema_dead_code=threshold).eval()
    ours = vector_quantize_pytorch.load(source(theirs), ("audio", "video", "text"), decay=0.9)
    x = torch.randn(3, 500, D)
    codes, indices, _ = theirs(x)
    assert torch.equal(ours.encode(x), indices)
    assert torch.equal(ours.decode(indices), theirs.get_codes_from_indices(indices))
    ours.eval()
    result = ours({"video": x})
    assert torch.equal(result.indices["video"], indices)
    # straight-through: z + (e - z) on both sides, theirs by default rotated
    close(result.quantized["video"], codes, rounding(torch.float32, 16, float(x.abs().max())))


@pytest.mark.parametrize("settings", [{}, {"decay": 0.9, "eps": 1e-3}])
def test_the_moving_average_goes_on_as_there(settings: dict[str, float]) -> None:
    """To rounding: each step is two products and two sums of at most 80 values below 5, and a
    division by counts that stay above eps.
    """
    theirs = trained(**settings)
    options = {"partner": "none", "reset_after": None}
    ours = vector_quantize_pytorch.load(theirs, ("audio",), **options)
    assert (ours.ema_codebook.decay, ours.ema_codebook.eps) == (
        settings.get("decay", 0.8),
        settings.get("eps", 1e-5),
    )
    before = ours.codebook
    for _ in range(STEPS):
        x = torch.randn(4, 20, D)
        ours({"audio": x})
        theirs(x)
    close(ours.codebook, theirs.codebook, rounding(torch.float32, STEPS * 80, 5.0))
    close(ours.ema_codebook.counts, theirs._codebook.cluster_size[0], rounding(torch.float32, 80))
    assert not torch.equal(ours.codebook, before)


def test_what_was_moved_is_a_copy() -> None:
    theirs = trained()
    ours = vector_quantize_pytorch.load(theirs)
    before = ours.codebook
    with torch.no_grad():
        theirs._codebook.embed.zero_()
    assert torch.equal(ours.codebook, before)
    assert bool(ours.ema_codebook.initialized)  # the first batch does not draw new codes


def test_one_head_of_many_by_hand() -> None:
    """As the error for several codebooks says."""
    theirs = VectorQuantize(2 * D, L, codebook_dim=D, heads=2, separate_codebook_per_head=True)
    for _ in range(5):
        theirs(torch.randn(4, 20, 2 * D))
    theirs.eval()
    x = torch.randn(3, 50, 2 * D)
    indices: Tensor = theirs(x)[1]
    buffers = theirs._codebook.state_dict()
    for h, part in enumerate(x.chunk(2, dim=-1)):
        head = {name: y[h : h + 1] if y.ndim else y for name, y in buffers.items()}
        ours = vector_quantize_pytorch.load(head)
        assert torch.equal(ours.encode(part), indices[..., h])
