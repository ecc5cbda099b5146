"""The code distribution and its gradient against the torch path in float64.

FORWARD: a squared distance sums D squares twice and D tf32x3 products (three runs, six roundings),
of centred entries below 2: off by (8 D + 18) roundings of 4 D, halved and divided by the smallest
distance for the distance itself; ln P moves by at most twice that, plus a rounding for each of the
steps to it. All but the last grow with the scale. BACKWARD: tf32x3 has up to seven roundings where
float32 has one, so at most seven times the error of the torch path in float32, and one rounding of
the largest gradient. Padding is NaN in both.
"""

from __future__ import annotations

import pytest
import torch
from support import bools, close, rounding, strided, uniform
from torch import Tensor

from mmvq_kernels.distribution import (
    backward_torch,
    code_log_probabilities_ref,
    forward_torch,
)
from mmvq_kernels.gpu import distribution, launching
from mmvq_kernels.gpu.distribution import backward, forward

# one of all, D past a tile, T past a tile, L past a block, blocks that span clips
SIZES = [(1, 1, 1, 1), (3, 10, 40, 8), (2, 19, 70, 13), (13, 5, 101, 33), (2, 3, 70, 256)]
FLOAT, DOUBLE = torch.float32, torch.float64
PROCESSORS = pytest.mark.parametrize("processors", [1, 132])  # whole, and in parts
SCALES = [1e-8, 1e-4, 1.0]


def draw(
    B: int, T: int, L: int, D: int, device: str, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    mask = bools(B, T, share=0.6)
    mask[:, T // 2] = True
    mask[2:] &= bools(B, 1, share=0.8, seed=3)[2:]  # clips without a valid segment
    x, codebook = scale * uniform(B, T, D), scale * uniform(L, D, seed=1)
    return x.float().to(device), codebook.float().to(device), mask.to(device)


def padded(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask[..., None], x, torch.nan)


def gradients(B: int, T: int, L: int, D: int, device: str, scale: float) -> list[Tensor]:
    """The gradient of `ln P`, and x, codebook and mask."""
    grad = uniform(B, L, dtype=torch.float32, seed=2).to(device)
    return [grad, *draw(B, T, L, D, device, scale)]


def check_forward(log_p: Tensor, exact: Tensor, x: Tensor, codebook: Tensor, scale: float) -> None:
    D = codebook.shape[1]
    nearest = torch.cdist(x.double().flatten(0, 1), codebook.double()).min().item()
    off = rounding(torch.float32, 8 * D + 18, 4 * D * scale**2) / 2 / nearest
    close(log_p.cpu(), exact.cpu(), 2 * off + rounding(torch.float32, 24, exact.abs().max().item()))


def check_backward(
    found: tuple[Tensor, Tensor], grad: Tensor, x: Tensor, codebook: Tensor, mask: Tensor | None
) -> None:
    single, exact = (
        backward_torch(*args, mask, *forward_torch(*args[1:], mask), True)
        for args in ([t.to(dtype) for t in (grad, x, codebook)] for dtype in (FLOAT, DOUBLE))
    )
    for mine, torchs, wanted in zip(found, single, exact, strict=True):
        assert mine.shape == wanted.shape
        error = (torchs - wanted).abs().max().item()
        largest = rounding(torch.float32, 1, wanted.abs().max().item())
        close(mine.cpu(), wanted.cpu(), 7 * error + largest)


@pytest.mark.parametrize(
    ("B", "T", "L", "D", "scale"),
    [(*size, 1.0) for size in SIZES] + [(*SIZES[1], scale) for scale in (1e-8, 1e-4, 1e4, 1e8)],
)
@PROCESSORS
def test_forward(
    B: int,
    T: int,
    L: int,
    D: int,
    scale: float,
    processors: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launching, "processors", lambda like: processors)
    x, codebook, mask = draw(B, T, L, D, device, scale)
    log_p, normalizers = forward(padded(x, mask), codebook, mask)
    assert log_p.shape == (B, L)
    assert normalizers.shape == (B, T)
    exact, _ = forward_torch(x.double(), codebook.double(), mask)
    zeroed = torch.cat([x, torch.zeros_like(x)])  # some clips are one segment of zeros
    check_forward(log_p, exact, zeroed, codebook, scale)
    everything, _ = forward(x, codebook, None)
    assert torch.equal(everything, forward(x, codebook, torch.ones_like(mask))[0])
    check_forward(everything, code_log_probabilities_ref(x, codebook), x, codebook, scale)


@pytest.mark.parametrize(
    ("B", "T", "L", "D", "scale"),
    [(*size, 1.0) for size in SIZES[2:]] + [(*SIZES[1], scale) for scale in SCALES],
)
@PROCESSORS
def test_backward(
    B: int,
    T: int,
    L: int,
    D: int,
    scale: float,
    processors: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launching, "processors", lambda like: processors)
    grad, x, codebook, mask = gradients(B, T, L, D, device, scale)
    args = grad, padded(x, mask), codebook, mask
    mine = backward(*args, *forward(*args[1:]), True)
    check_backward(mine, grad, x, codebook, mask)
    assert (mine[0][~mask] == 0).all()
    alone, nothing = backward(*args, *forward(*args[1:]), False)
    assert torch.equal(alone, mine[0])
    assert nothing.numel() == 0
    every = backward(grad, x, codebook, None, *forward(x, codebook, None), True)
    check_backward(every, grad, x, codebook, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@PROCESSORS
def test_half_precision_and_strides_only_round_the_gradients(
    dtype: torch.dtype, processors: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each to its own dtype; all else is computed in float32."""
    monkeypatch.setattr(launching, "processors", lambda like: processors)
    grad, x, codebook, mask = gradients(3, 10, 80, 24, device, 1.0)
    x, codebook = x.to(dtype), codebook.to(dtype)
    wide = x.float(), codebook.float(), mask
    half = strided(x), strided(codebook), strided(mask.float()).bool()
    wanted, found = forward(*wide), forward(*half)
    for mine, other in zip(found, wanted, strict=True):
        assert torch.equal(mine, other)
    exact = backward(grad, *wide, *wanted, True)
    for mine, other in zip(backward(strided(grad), *half, *found, True), exact, strict=True):
        assert torch.equal(mine, other.to(dtype))


def test_long_clips(device: str) -> None:
    """Whose segments are counted a part at a time."""
    x, codebook, mask = draw(3, 150, 5, 8, device)
    mask[1, :130] = False
    log_p, _ = forward(padded(x, mask), codebook, mask)
    exact, _ = forward_torch(x.double(), codebook.double(), mask)
    check_forward(log_p, exact, torch.cat([x, torch.zeros_like(x)]), codebook, 1.0)


def test_a_code_far_away_does_not_blur_the_others(device: str) -> None:
    """As it would if they were measured from the mean code, 250,000 away from all of them."""
    x, codebook, _ = draw(3, 10, 40, 8, device)
    codebook[20] = 1e7
    log_p, _ = forward(x, codebook, None)
    others = torch.arange(40, device=codebook.device) != 20
    exact = code_log_probabilities_ref(x, codebook)[:, others]
    check_forward(log_p[:, others], exact, x, codebook[others], 1.0)


@pytest.mark.parametrize("scale", SCALES)
def test_a_code_has_no_part_in_the_gradient_of_a_vector_on_it(device: str, scale: float) -> None:
    """As in the reference, up to the gradient of the others, as in `test_backward`."""
    grad, x, codebook, mask = gradients(2, 3, 20, 8, device, scale)
    x[0, 0], x[1, 2] = codebook[3], codebook[4]
    mine = backward(grad, x, codebook, mask, *forward(x, codebook, mask), True)
    check_backward(mine, grad, x, codebook, mask)


@pytest.mark.parametrize("scale", [1e4, 1e6, 1e8])
def test_a_gradient_is_bounded_where_distances_are_off_by_many_nats(
    device: str, scale: float
) -> None:
    """By sum_l |p a - g w| with p and w of at most 1, and no more than L of |g w| in a."""
    grad, x, codebook, mask = gradients(3, 10, 40, 8, device, scale)
    of_x, _ = backward(grad, x, codebook, mask, *forward(x, codebook, mask), True)
    g = grad.abs()
    bound = 40 * (g.sum(1) + g.amax(1))
    assert (of_x.norm(dim=-1) <= bound[:, None]).all()
    assert (of_x != 0).any()


@pytest.mark.parametrize("only", [0, 15, 16, 18, 40])
def test_a_clip_may_begin_with_segments_that_do_not_count(only: int, device: str) -> None:
    """More of them than the kernel reads at a time, all but one of the clip; as in `test_forward`.

    One segment that counts is a clip of its own: the mean over it is its own distribution.
    """
    x, codebook, mask = draw(2, 41, 70, 8, device)
    mask[:] = False
    mask[:, only] = True
    log_p, _ = forward(x, codebook, mask)
    alone = x[:, only : only + 1]
    check_forward(log_p, code_log_probabilities_ref(alone, codebook), alone, codebook, 1.0)


@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
@pytest.mark.parametrize("distances", [1, 3 * 5 * 112, 17 * 5 * 112])
def test_clips_may_come_a_block_at_a_time(
    distances: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One or some of 19, the last block smaller: the same up to the order of sums."""
    grad, x, codebook, mask = gradients(19, 5, 101, 33, device, 1.0)
    x, codebook = x.to(dtype), codebook.to(dtype)
    whole = forward(x, codebook, mask)
    of_x, of_codes = backward(grad, x, codebook, mask, *whole, True)
    monkeypatch.setattr(distribution, "_DISTANCES", distances)
    for mine, wanted in zip(forward(x, codebook, mask), whole, strict=True):
        close(mine, wanted, rounding(FLOAT, 16, wanted.abs().max().item()))
    found = backward(grad, x, codebook, mask, *whole, True)
    assert torch.equal(found[0], backward(grad, x, codebook, mask, *whole, False)[0])
    for mine, wanted in zip(found, (of_x, of_codes), strict=True):
        assert mine.dtype == dtype
        close(mine, wanted, rounding(dtype, 64, wanted.abs().max().item()))
    if dtype == FLOAT:
        check_backward(found, grad, x, codebook, mask)


def test_no_clip_has_no_gradient(device: str) -> None:
    x, codebook, mask = draw(2, 3, 20, 8, device)
    x, mask = x[:0], mask[:0]
    log_p, normalizers = forward(x, codebook, mask)
    assert log_p.shape == (0, 20)
    of_x, of_codes = backward(log_p, x, codebook, mask, log_p, normalizers, True)
    assert of_x.shape == x.shape
    assert torch.equal(of_codes, torch.zeros_like(codebook))


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("codes", [[7], [10], [0, 10, 19]])
def test_a_code_that_is_not_finite_shows(codes: list[int], value: float, device: str) -> None:
    """Also where it takes part in the choice of the centre."""
    x, codebook, mask = draw(2, 3, 20, 8, device)
    codebook[codes, 3] = value
    log_p, _ = forward(x, codebook, mask)
    assert not log_p.isfinite()[:, codes].any()


def test_far_codes_have_finite_logarithms(device: str) -> None:
    x, codebook, mask = draw(2, 3, 20, 8, device)
    codebook[5] = 1000  # e^-2800 is 0 in float32
    log_p, _ = forward(x, codebook, mask)
    assert log_p.isfinite().all()
    assert log_p[:, 5].max() < -2000


def test_same_bits_for_repetition(device: str) -> None:
    grad, x, codebook, mask = gradients(3, 10, 40, 8, device, 1.0)
    runs = [forward(x, codebook, mask) for _ in range(2)]
    runs = [(*out, *backward(grad, x, codebook, mask, *out, True)) for out in runs]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_every_code_with_the_tiles_of_amd(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tiles have 64 codes at most."""
    x, codebook = uniform(2, 5, 8).float().to(device), uniform(200, 8, seed=1).float().to(device)
    expected = forward(x, codebook, None)
    monkeypatch.setattr(launching, "amd", lambda like: "gfx942")
    grad = torch.ones_like(expected[0])
    for found, wanted in zip(forward(x, codebook, None), expected, strict=True):
        close(found, wanted, 1e-4)
    for found, wanted in zip(
        backward(grad, x, codebook, None, *expected, True),
        backward_torch(grad, x, codebook, None, *expected, True),
        strict=True,
    ):
        close(found, wanted, 1e-4)
