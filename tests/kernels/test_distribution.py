"""The torch path of the code distribution: blocks of clips, its own gradient, its memory.

ATOL: entries and codes in [-1, 1], so a squared distance sums D products of at most 4, twice: off
by (D + 4) roundings of 8 D. Its root is above 0.1 here, hence off by 5 times that at most, and so
is a logarithm of a softmax; the mean over T adds a few roundings.
"""

from __future__ import annotations

import pytest
import torch
from support import DTYPES, bools, close, peak_growth, rounding, strided, uniform, wide
from torch import Tensor

from mmvq_kernels import code_log_probabilities
from mmvq_kernels.distribution import (
    _distances,
    cancellation_threshold,
    code_log_probabilities_ref,
)

B, T, D, L = 7, 5, 3, 41


def atol(dtype: torch.dtype) -> float:
    return 5 * rounding(dtype, D + 4 + T, 8 * D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("block_bytes", [1, 3 * T * L * 8, 1 << 22])
def test_blocks_of_any_size(
    dtype: torch.dtype, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmvq_kernels.distribution._BLOCK_BYTES", block_bytes)
    x, codebook = uniform(B, T, D, dtype=dtype), 2 + uniform(L, D, dtype=dtype, seed=1)
    close(code_log_probabilities(x, codebook), code_log_probabilities_ref(x, codebook), atol(dtype))
    assert code_log_probabilities(x[:0], codebook).shape == (0, L)


@pytest.mark.parametrize("clips", [1, 3, 100])
def test_the_gradient_by_recomputation(clips: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmvq_kernels.distribution._BLOCK_BYTES", clips * T * L * 8)
    x = uniform(B, T, D).requires_grad_()
    codebook = uniform(L, D, seed=1).requires_grad_()
    mask = bools(B, T, seed=2)
    mask[3] = False
    assert torch.autograd.gradcheck(code_log_probabilities, (x, codebook, mask))
    (alone,) = torch.autograd.grad(code_log_probabilities(x, codebook.detach(), mask).sum(), x)
    both = torch.autograd.grad(code_log_probabilities(x, codebook, mask).sum(), (x, codebook))
    assert torch.equal(alone, both[0])


@pytest.mark.parametrize("masked", [False, True])
def test_a_clip_without_a_segment_is_one_of_zeros(masked: bool) -> None:
    """As one is whose segments are all masked, whatever lies there."""
    x, codebook = uniform(B, T, D).requires_grad_(), uniform(L, D, seed=1).requires_grad_()
    none = torch.zeros(B, T, dtype=torch.bool)
    found = code_log_probabilities(x[:, :0], codebook, none[:, :0] if masked else None)
    wanted = code_log_probabilities_ref(torch.zeros(1, 1, D), codebook).expand(B, L)
    other = code_log_probabilities(x, codebook, none)
    close(found, wanted, atol(torch.float64))
    close(other, wanted, atol(torch.float64))
    of_x, of_codebook = torch.autograd.grad(found[:, 3].sum(), (x, codebook))
    assert (of_x == 0).all()
    exact, alike = (torch.autograd.grad(p[:, 3].sum(), codebook)[0] for p in (wanted, other))
    for mine in (of_codebook, alike):
        close(mine, exact, B * atol(torch.float64))


def slacks(x: Tensor, codebook: Tensor, grad: Tensor, dtype: torch.dtype) -> list[float]:
    """How far off `ln P` and the gradients of x and codebook may be, computed in `dtype`.

    A square of a distance d sums D products four times, and is off by (D + 4) roundings of
    |x|^2 + |e|^2; `off` is what that makes of d, or of a logit. Logits off by h move a softmax q by
    min(q, 1 - q) (e^2h - 1) at most. The gradient of d is `c (x - e) / d`, c = p a - g w.
    """
    centre = codebook.mean(0)
    x, codes = x - centre, codebook - centre
    d = (x[:, :, None] - codes).norm(dim=-1)  # [B, T, L]
    lengths = x.norm(dim=-1)[..., None] + codes.norm(dim=-1)
    relative = torch.where(d > 0, rounding(dtype, D + 4) * (lengths / d).square() / 2, 0)
    off = (relative * d).max() + rounding(dtype, 4) * d.max()
    log_p = (-d).log_softmax(-1)
    log_w = log_p.log_softmax(1)
    p, w, g = log_p.exp(), log_w.exp(), grad[:, None].abs()
    dp, dw = (
        torch.minimum(log_q.exp(), -torch.expm1(log_q)) * torch.expm1((2 * h).clamp(max=700))
        for log_q, h in ((log_p, off), (log_w, 2 * off))
    )
    a, da = (g * w).sum(-1, keepdim=True), (g * dw).sum(-1, keepdim=True)
    dc = dp * (a + da) + p * da + g * dw
    numerator = torch.where(d > 0, rounding(dtype, L + B * T + 4) * lengths / d, 0)
    each = dc + (p * a + g * w + dc) * (relative + numerator)  # of the gradient, [B, T, L]
    largest = log_p.logsumexp(1).abs().max().item()
    forward = 2 * off.item() + rounding(dtype, 24, largest)
    return [forward, each.sum(-1).max().item(), each.sum((0, 1)).max().item()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-8, 1e-5, 1e-3, 1.0, 1e2, 1e4, 1e8])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_right_at_every_scale_also_on_a_code(
    scale: float, offset: float, dtype: torch.dtype
) -> None:
    if dtype == torch.float16 and not 1e-5 <= scale <= 1e4:
        pytest.skip("no number of this size")
    x, codebook = offset + uniform(B, T, D), offset + uniform(L, D, seed=1)
    x[0, 0], x[3] = codebook[5], codebook[:T]
    if scale <= 1:
        x[1, 1], codebook[7] = (codebook[8] + codebook[9]) / 2, codebook[6]
        x[2, 2] = codebook[6]
    else:  # ties of codes would rest on a rounding, those of segments are not in `slacks`
        x = x.reshape(B * T, 1, D)
    x, codebook = ((scale * t).to(dtype).requires_grad_() for t in (x, codebook))
    exact_x, exact_codebook = (t.detach().double().requires_grad_() for t in (x, codebook))
    grad = uniform(len(x), L, dtype=torch.float32, seed=2)

    log_p = code_log_probabilities(x, codebook)
    found = log_p, *torch.autograd.grad(log_p, (x, codebook), grad.to(log_p.dtype))
    exact = code_log_probabilities_ref(exact_x, exact_codebook)
    wanted = exact, *torch.autograd.grad(exact, (exact_x, exact_codebook), grad.double())
    tolerances = slacks(exact_x.detach(), exact_codebook.detach(), grad.double(), wide(dtype))
    for mine, other, tolerance in zip(found, wanted, tolerances, strict=True):
        largest = other.abs().max().item()
        assert tolerance < largest / 2  # zeros, as an absolute floor makes them, would fail
        close(mine, other, tolerance + rounding(mine.dtype, 1, largest))


def test_autocast_changes_no_bit_and_strides_no_more_than_rounding() -> None:
    """Also where backward is called under autocast."""
    x, codebook = uniform(B, T, D).float(), 2 + uniform(L, D, seed=1).float()

    def run(x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        x, codebook = x.requires_grad_(), codebook.requires_grad_()
        log_p = code_log_probabilities(x, codebook)
        return log_p.detach(), *torch.autograd.grad(log_p.square().sum(), (x, codebook))

    expected = run(x, codebook)
    with torch.autocast("cpu", torch.bfloat16):
        for mine, other in zip(run(x, codebook), expected, strict=True):
            assert torch.equal(mine, other)
    for other_x in (strided(x.detach()), x.detach().transpose(0, 1).contiguous().transpose(0, 1)):
        for mine, other in zip(run(other_x, strided(codebook.detach())), expected, strict=True):
            close(mine, other, 4 * atol(torch.float32) * other.abs().max().item())


def test_memory_holds_a_few_clips() -> None:
    """All distances are 256 MiB in float32, and plain autograd keeps several such tensors."""
    setup = (
        "def step(B, T, L):\n"
        "    x = torch.rand(B, T, 4, requires_grad=True)\n"
        "    log_p = mmvq_kernels.code_log_probabilities(x, torch.rand(L, 4))\n"
        "    log_p.square().sum().backward()\n"
        "step(2, 3, 5)\n"
    )
    assert peak_growth(setup, "step(64, 64, 16384)") < 400  # a block is 8 MiB, the result 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("D", [1, 2, 8, 64, 256, 1024])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_a_vector_on_a_code_is_at_distance_0_and_one_beside_it_is_not(
    dtype: torch.dtype, D: int, scale: float
) -> None:
    codes = (scale * uniform(128, D)).to(dtype)
    norms = codes.square().sum(-1)
    on, lost = _distances(codes[None], codes, norms)
    assert (on[0].diagonal() == 0).all()
    assert lost is not None
    assert torch.equal(lost, on == 0)
    beside = codes * (1 + 2 * cancellation_threshold(dtype, D) ** 0.5)  # four times the share
    off, _ = _distances(beside[None], codes, norms)
    assert (off[0].diagonal() > 0).all()
