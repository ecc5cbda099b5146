"""Every dtype with every feature, and many steps in half precision beside float64."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from parts import LOSSES, losses
from support import DTYPES, bools, close, same, state, uniform, wide
from torch import Tensor, nn

from mmvq import (
    CrossCPC,
    CrossModalCodeMatchingLoss,
    CrossModalCommitmentLoss,
    MultiModalEMAQuantizer,
)

B, T, D, L = 4, 5, 4, 8
NAMES = ("audio", "text", "video")
LOW = {torch.bfloat16: "bfloat16", torch.float16: "half"}
Tensors = dict[str, Tensor]


def batch(dtype: torch.dtype, seed: int = 0) -> Tensors:
    return {
        m: uniform(B, T, D, dtype=dtype, seed=seed + i).requires_grad_()
        for i, m in enumerate(NAMES)
    }


def third(z: Tensor, others: Tensors, masks: Tensors) -> Tensor:
    return (z + sum(others.values())) / 3


CODES = uniform(L, D, dtype=torch.float32, seed=9)
MASKS = {m: bools(B, T, seed=i) for i, m in enumerate(NAMES)}
OPTIONS: dict[str, dict[str, Any]] = {
    "attention, masks, reset": {"reset_after": 1},
    "aligned partner": {"partner": "aligned"},
    "no partner, rotation": {"partner": "none", "gradient": "rotation"},
    "a callable partner": {"partner": third},
    "rotation, masks, reset": {"gradient": "rotation", "reset_after": 1},
    "manual update": {"update": "manual"},
    "samples, any": {"init": "samples", "reset_rule": "any", "update_from": ["text"]},
    "pairs": {"commitment": CrossModalCommitmentLoss(0.5, {("audio", "text"): 1.0}, "sum")},
    "no commitment": {"commitment": None},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_quantizer_in_every_dtype(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Outputs in that of the features; loss and state in at least float32; all finite."""
    quantizer = MultiModalEMAQuantizer(D, L, NAMES, **options)
    for step in range(2):
        z = batch(dtype, seed=step)
        quantized, indices, loss = quantizer(z, MASKS if options.get("reset_after") else None)
        quantizer.update_codebook()
        assert list(quantized) == list(indices) == sorted(NAMES)
        for m, x in z.items():
            assert quantized[m].shape == x.shape
            assert quantized[m].dtype == dtype
            assert indices[m].shape == (B, T)
            assert indices[m].dtype == torch.long
        assert loss.shape == ()
        (loss + sum(q.to(loss).square().sum() for q in quantized.values())).backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in z.values())
    floats = [loss, *(x for x in state(quantizer).values() if x.is_floating_point())]
    assert {x.dtype for x in floats} == {wide(dtype)}
    assert all(x.isfinite().all() for x in floats)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", ["float32", "as the features"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_in_every_dtype(name: str, parameters: str, dtype: torch.dtype) -> None:
    """Finite, and so is the gradient, which has the dtype of the features."""
    own = torch.float32 if parameters == "float32" else dtype
    z = batch(dtype)
    out = losses(NAMES, CODES.to(own), own)[name](z, MASKS)
    assert out.shape == ()
    # Cross-CPC is computed in the dtype of its parameters, the others in the widest of all
    assert out.dtype == (torch.float32 if own != dtype and "cpc" in name else wide(dtype))
    assert out.isfinite()
    out.backward()
    gradients = [x.grad for x in z.values() if x.grad is not None]
    assert len(gradients) >= 2
    assert all(g.dtype == dtype and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("partner", ["attention", "aligned", "none"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32, torch.float16),
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64, torch.bfloat16),
    ],
    ids=str,
)
def test_modalities_may_come_in_dtypes_of_their_own(dtypes: Any, partner: Any) -> None:
    """The codebook sees them all in the widest, at least float32; each gets back its own."""
    widest = torch.float64 if torch.float64 in dtypes else torch.float32
    z = {m: x.to(t) for (m, x), t in zip(batch(torch.float64).items(), dtypes, strict=True)}
    module = MultiModalEMAQuantizer(D, L, NAMES, partner=partner, reset_after=1)
    twin = deepcopy(module)
    for _ in range(2):
        leaves = {m: x.detach().requires_grad_() for m, x in z.items()}
        quantized, indices, loss = module(leaves, MASKS)
        expected = twin({m: x.to(widest) for m, x in z.items()}, MASKS)
        assert loss.dtype == widest
        close(loss, expected.loss, 0)
        for m, x in leaves.items():
            assert quantized[m].dtype == x.dtype
            assert torch.equal(quantized[m], expected.quantized[m].to(x.dtype))
            assert torch.equal(indices[m], expected.indices[m])
        every = losses(NAMES, module.codebook)
        (loss + sum(term(leaves, MASKS) for term in every.values())).backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves.values())
        assert same(state(module), state(twin))


STEPS, DECAY, SPREAD = 100, 0.9, 0.1


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_many_steps_in_half_precision_stay_beside_float64(dtype: torch.dtype) -> None:
    """Cast or under autocast, the codes differ from float64's by the rounding of the inputs alone.

    The vectors lie near L far corners, so that no rounding changes an index, and N is the same. A
    code is then a mean of vectors of entries up to S, weighted by (1 - g) g^k at lag k. Rounding
    each input by its unit roundoff u moves any such mean by at most u S: the average does not add
    it up. To this the float32 recurrence adds, with v its unit roundoff and n rows in a batch,
    (n + 8) v S for sums, mixtures and the division, and, for o and N each, 3 roundings a step
    (product, product, sum) of which 1 / (1 - g) are remembered: 2 * 3 v S / (1 - g). The decay
    itself is rounded, by v: the mean lag, 1 / (1 - g), shifts by that much relatively, another
    v S / (1 - g). A state kept in `dtype` would be off by 3 u S / (1 - g), 30 times as much.

    A squared difference d^2 of the loss moves by at most 2 d E + E^2, E = u S + the bound of codes.
    """
    narrow, v = torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    corners = 2 * torch.eye(D, dtype=torch.float64).repeat(2, 1)
    corners[D:] *= -1  # [2 D, D]: far apart
    build = {"partner": "aligned", "decay": DECAY, "reset_after": None, "init": "uniform"}
    exact, cast, amp = (MultiModalEMAQuantizer(D, 2 * D, NAMES, **build) for _ in range(3))
    exact.double()
    getattr(cast, LOW[dtype])()
    for module in (exact, cast, amp):
        module.set_codes(corners.to(module.codebook))
    largest = 2 + SPREAD
    rows = len(NAMES) * B
    code_error = 1.01 * largest * (narrow + v * (rows + 8 + 7 / (1 - DECAY)))
    error = code_error + narrow * largest
    loss_error = 0.25 * 1.5 * len(NAMES) * (2 * (2 * SPREAD) * error + error**2)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        corner = torch.randint(len(corners), (B,), generator=generator)
        drift = 0.5 * SPREAD * step / STEPS  # the codes have somewhere to go
        noise = torch.rand(len(NAMES), B, D, generator=generator, dtype=torch.float64) - 0.5
        z = dict(zip(NAMES, corners[corner] + drift + SPREAD * noise, strict=True))
        low = {m: x.to(dtype) for m, x in z.items()}
        expected, out = exact(z), cast(low)
        with torch.autocast("cpu", dtype):
            other = amp(low)
        assert all(torch.equal(out.indices[m], expected.indices[m]) for m in NAMES)
        close(out.loss, expected.loss, loss_error)
        assert torch.equal(out.loss, other.loss)
    assert same(state(cast), state(amp))
    assert {x.dtype for x in state(cast).values() if x.is_floating_point()} == {torch.float32}
    close(cast.codebook, exact.codebook, code_error)
    moved = (exact.codebook - corners).abs().max().item()
    assert moved > 3 * v * largest / (1 - DECAY)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cast", DTYPES, ids=str)
def test_autocast_to_a_third_dtype(dtype: torch.dtype, cast: torch.dtype) -> None:
    """The dtype of the features, that of the parameters and autocast's may all differ."""
    z = batch(dtype)
    quantizer = MultiModalEMAQuantizer(D, L, NAMES).to(cast)
    with torch.autocast("cpu", torch.bfloat16):
        terms = [quantizer(z, MASKS).loss]
        every = losses(NAMES, quantizer.codebook, cast)
        terms += [loss(z, MASKS) for loss in every.values()]
    torch.stack([term.double() for term in terms]).sum().backward()
    for x in z.values():
        assert x.grad is not None
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_mixed_precision_training_of_encoders(dtype: torch.dtype) -> None:
    """Autocast, and for float16 a GradScaler: the state is to the bit that of float32 training on
    the features which the encoders gave, the scaler's skipped steps included; nothing overflows.
    """
    torch.manual_seed(0)
    encoders = nn.ModuleDict({m: nn.Linear(D, D) for m in NAMES})
    cpc, matching = CrossCPC(D, NAMES), CrossModalCodeMatchingLoss()
    quantizer = MultiModalEMAQuantizer(D, L, NAMES, reset_after=5)
    plain = deepcopy(quantizer)
    parameters = [*encoders.parameters(), *cpc.parameters()]
    optimiser = torch.optim.Adam(parameters, 1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, enabled=dtype == torch.float16)
    history, skipped = [], 0
    for step in range(60):
        seen = batch(torch.float32, seed=step)
        with torch.autocast("cpu", dtype):
            z = {m: encoders[m](x.detach()) for m, x in seen.items()}
            quantized, _, loss = quantizer(z, MASKS)
            loss = loss + cpc(z, MASKS, start="all").loss
            loss = loss + matching(z, quantizer.codebook, MASKS)
            loss = loss + sum((q - seen[m]).square().mean() for m, q in quantized.items())
        assert all(x.dtype == dtype for x in z.values())
        plain({m: x.detach().float() for m, x in z.items()}, MASKS)
        optimiser.zero_grad()
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimiser)
        scaler.update()
        skipped += scaler.get_scale() < before
        history.append(loss.item())
    assert torch.tensor(history).isfinite().all()
    assert sum(history[-10:]) < sum(history[:10]) - 1
    assert all(x.isfinite().all() for x in parameters)
    assert skipped < 20
    if dtype == torch.float16:
        assert skipped > 0  # the first scale is too large on purpose
    assert same(state(quantizer), state(plain))
