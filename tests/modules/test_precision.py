"""Every dtype with every feature, and a thousand steps in half precision beside float64."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from support import DTYPES, bools, close, same, state, uniform, wide
from torch import Tensor, nn

from mmvq import (
    CLUBEstimator,
    CrossCPC,
    CrossModalCodeMatchingLoss,
    CrossModalCommitmentLoss,
    MultiModalEMAQuantizer,
    functional,
)

B, T, D, L = 4, 5, 4, 8
NAMES = ("audio", "text", "video")
LOW = {torch.bfloat16: "bfloat16", torch.float16: "half"}
Tensors = dict[str, Tensor]


def batch(dtype: torch.dtype, names: tuple[str, ...] = NAMES, seed: int = 0) -> Tensors:
    return {
        m: uniform(B, T, D, dtype=dtype, seed=seed + i).requires_grad_()
        for i, m in enumerate(names)
    }


def masks(names: tuple[str, ...] = NAMES) -> Tensors:
    return {m: bools(B, T, seed=i) for i, m in enumerate(names)}


def quantize(names: tuple[str, ...] = NAMES, **options: Any) -> Callable[[Tensors], Tensor]:
    def run(z: Tensors) -> Tensor:
        quantizer = MultiModalEMAQuantizer(D, L, NAMES, **options)
        given = masks() if options.get("reset_after") == 1 else None
        for _ in range(2):
            quantized, _, loss = quantizer(z, given)
            if options.get("update") == "manual":
                quantizer.update_codebook()
        dtype = next(iter(z.values())).dtype
        assert all(q.dtype == dtype and q.isfinite().all() for q in quantized.values())
        floats = [x for x in quantizer.state_dict().values() if x.is_floating_point()]
        assert all(x.dtype == wide(dtype) and x.isfinite().all() for x in floats)
        return loss + sum(q.to(loss).square().sum() for q in quantized.values())

    return run


def third(z: Tensor, others: Tensors, masks: Tensors) -> Tensor:
    return (z + sum(others.values())) / 3


CODES = uniform(L, D, dtype=torch.float32, seed=9)
MASKS = masks()
PARTS: dict[str, Callable[[Tensors], Tensor]] = {
    "attention, masks, reset": quantize(reset_after=1),
    "aligned partner": quantize(partner="aligned"),
    "no partner": quantize(partner="none"),
    "a callable partner": quantize(partner=third),
    "rotation": quantize(gradient="rotation", reset_after=1),
    "manual update": quantize(update="manual"),
    "samples, any, one updates": quantize(init="samples", reset_rule="any", update_from=["text"]),
    "commitment by pairs": quantize(
        commitment=CrossModalCommitmentLoss(0.5, {("audio", "text"): 1.0}, "sum")
    ),
    "no commitment": quantize(commitment=None),
    "modalities missing": lambda z: quantize()({"text": z["text"]}),
    "commitment": lambda z: CrossModalCommitmentLoss()(z, z, MASKS),
    "matching": lambda z: CrossModalCodeMatchingLoss()(z, CODES, MASKS),
    "CPC": lambda z: CrossCPC(D, NAMES, num_steps=2, self_weight=1.0)(z, MASKS, start="all").loss,
    "CPC of cosines": lambda z: CrossCPC(D, NAMES, normalize=True, temperature=0.1)(z).loss,
    "CPC in the features' dtype": lambda z: (
        CrossCPC(D, NAMES).to(z["text"].dtype)(z, start="all").loss
    ),
    "CLUB": lambda z: CLUBEstimator(D, D, 8)(z["audio"], z["text"], MASKS["audio"]),
    "CLUB, one negative": lambda z: CLUBEstimator(D, D, 8, negatives="shuffled")(
        z["audio"], z["text"]
    ),
    "CLUB in the features' dtype": lambda z: CLUBEstimator(D, D, 8).to(z["text"].dtype)(
        z["audio"], z["text"]
    ),
    "CLUB's likelihood": lambda z: CLUBEstimator(D, D, 8).log_likelihood(z["audio"], z["text"]),
    "functional.commitment": lambda z: functional.commitment(z, dict.fromkeys(z, z["text"])),
    "functional.code_matching": lambda z: functional.code_matching(z, CODES),
    "functional.code_probabilities": lambda z: (
        functional.code_probabilities(z["text"], CODES).square().sum()
    ),
    "functional.info_nce": lambda z: functional.info_nce(
        z["audio"], z["text"], mask=MASKS["text"], symmetric=True
    ),
    "functional.club": lambda z: functional.club(z["audio"], z["text"], z["video"], MASKS["text"]),
    "functional.gaussian_log_likelihood": lambda z: functional.gaussian_log_likelihood(*z.values()),
}
NARROW = {  # what is in the dtype of its arguments, or of the module's parameters
    "functional.cross_attend": lambda z: functional.cross_attend(
        z["audio"], {"b": z["text"]}, {"b": MASKS["text"]}
    ),
    "functional.aligned_partner": lambda z: functional.aligned_partner(
        z["audio"], {"b": z["text"]}, {"b": MASKS["text"]}
    ),
    "functional.straight_through": lambda z: functional.straight_through(z["audio"], z["text"]),
    "functional.rotate": lambda z: functional.rotate(z["audio"], z["text"]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*PARTS, *NARROW])
def test_every_part_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    """Finite forward and backward; a loss is in at least float32, a gradient in its own dtype."""
    z = batch(dtype)
    out = (PARTS | NARROW)[name](z)
    if name in PARTS:
        own_weights = name.startswith(("CPC", "CLUB")) and "features' dtype" not in name
        assert out.shape == ()
        # CPC is computed in the dtype of its weights, float32 here; the likelihood in the wider
        assert out.dtype == (torch.float32 if own_weights and "CPC" in name else wide(dtype))
    else:
        assert out.dtype == dtype
    assert out.isfinite().all()
    out.sum().backward()
    gradients = [x.grad for x in z.values() if x.grad is not None]
    assert gradients
    assert all(g.dtype == dtype and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("partner", ["attention", "aligned", "none"])
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_the_quantizer_in_every_dtype_with_every_feature(
    dtype: torch.dtype, partner: Any, gradient: Any, masked: bool
) -> None:
    quantizer = MultiModalEMAQuantizer(
        D, L, NAMES, partner=partner, gradient=gradient, reset_after=1
    )
    for step in range(2):
        z = batch(dtype, seed=step)
        quantized, indices, loss = quantizer(z, MASKS if masked else None)
        assert list(quantized) == list(indices) == sorted(NAMES)
        for m, x in z.items():
            assert quantized[m].shape == x.shape
            assert quantized[m].dtype == dtype
            assert indices[m].shape == (B, T)
            assert indices[m].dtype == torch.long
        assert loss.shape == ()
        assert loss.dtype == wide(dtype)
        (loss + sum(q.float().square().sum() for q in quantized.values())).backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in z.values())
    floats = [x for x in quantizer.state_dict().values() if x.is_floating_point()]
    assert {x.dtype for x in floats} == {wide(dtype)}
    assert all(x.isfinite().all() for x in floats)


def test_autocast_changes_no_bit_of_the_state() -> None:
    plain = MultiModalEMAQuantizer(D, L, NAMES)
    plain(batch(torch.float32, seed=1))
    cast, encoder = deepcopy(plain), nn.Linear(D, D)
    with torch.autocast("cpu", torch.bfloat16):
        z = {m: encoder(x) for m, x in batch(torch.float32).items()}
        assert z["audio"].dtype == torch.bfloat16
        quantized, indices, loss = cast(z)
    expected = plain({m: x.detach() for m, x in z.items()})
    assert same(state(cast), state(plain))
    assert loss.dtype == torch.float32
    assert torch.equal(loss.detach(), expected.loss)
    assert same(indices, expected.indices)
    assert same({m: q.detach() for m, q in quantized.items()}, expected.quantized)
    (loss + quantized["audio"].float().sum()).backward()
    assert encoder.weight.grad is not None
    assert encoder.weight.grad.isfinite().all()


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
    matching = CrossModalCodeMatchingLoss()
    for _ in range(3):
        leaves = {m: x.detach().requires_grad_() for m, x in z.items()}
        quantized, indices, loss = module(leaves, MASKS)
        expected = twin({m: x.to(widest) for m, x in z.items()}, MASKS)
        assert loss.dtype == widest
        close(loss, expected.loss, 0)
        for m, x in leaves.items():
            assert quantized[m].dtype == x.dtype
            assert torch.equal(quantized[m], expected.quantized[m].to(x.dtype))
            assert torch.equal(indices[m], expected.indices[m])
        total = loss + matching(leaves, module.codebook, MASKS)
        total = total + CrossCPC(D, NAMES)(leaves, MASKS).loss
        total = total + CLUBEstimator(D, D, 8)(leaves["audio"], leaves["text"])
        total.backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves.values())
        assert same(state(module), state(twin))


STEPS, DECAY, SPREAD = 1000, 0.99, 0.1


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_thousand_steps_in_half_precision_stay_beside_float64(dtype: torch.dtype) -> None:
    """Cast or under autocast, the codes differ from float64's by the rounding of the inputs alone.

    The vectors lie near L far corners, so that no rounding changes an index, and N is the same. A
    code is then a mean of vectors of entries up to S, weighted by (1 - g) g^k at lag k. Rounding
    each input by its unit roundoff u moves any such mean by at most u S: the average does not add
    it up. To this the float32 recurrence adds, with v its unit roundoff and n rows in a batch,
    (n + 8) v S for sums, mixtures and the division, and, for o and N each, 3 roundings a step
    (product, product, sum) of which 1 / (1 - g) are remembered: 2 * 3 v S / (1 - g). The decay
    itself is rounded, by v: the mean lag, 1 / (1 - g), shifts by that much relatively, another
    v S / (1 - g). A state kept in `dtype` would be off by 3 u S / (1 - g), a hundred times as much.

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
    z, given = batch(dtype), masks()
    cpc, club = CrossCPC(D, NAMES).to(cast), CLUBEstimator(D, D, 8).to(cast)
    quantizer = MultiModalEMAQuantizer(D, L, NAMES).to(cast)
    with torch.autocast("cpu", torch.bfloat16):
        quantized, _, loss = quantizer(z, given)
        terms = [
            loss,
            cpc(z, given, start="all").loss,
            club(z["audio"], z["text"], given["audio"]),
            CrossModalCodeMatchingLoss()(z, quantizer.codebook, given),
            CrossModalCommitmentLoss()(z, quantized, given),
        ]
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
    parts = nn.ModuleList([CrossCPC(D, NAMES), CLUBEstimator(D, D, 8)])
    quantizer = MultiModalEMAQuantizer(D, L, NAMES, reset_after=5)
    plain = deepcopy(quantizer)
    matching = CrossModalCodeMatchingLoss()
    parameters = [*encoders.parameters(), *parts.parameters()]
    optimiser = torch.optim.Adam(parameters, 3e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, enabled=dtype == torch.float16)
    losses, skipped = [], 0
    for step in range(200):
        seen = batch(torch.float32, seed=step)
        with torch.autocast("cpu", dtype):
            z = {m: encoders[m](x.detach()) for m, x in seen.items()}
            quantized, _, loss = quantizer(z, MASKS)
            loss = loss + parts[0](z, MASKS, start="all").loss
            loss = loss + matching(z, quantizer.codebook, MASKS)
            loss = loss + parts[1](z["audio"], z["text"], MASKS["audio"]).square()
            loss = loss + sum((q - seen[m]).square().mean() for m, q in quantized.items())
        assert all(x.dtype == dtype for x in z.values())
        plain({m: x.detach().float() for m, x in z.items()}, MASKS)
        optimiser.zero_grad()
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimiser)
        scaler.update()
        skipped += scaler.get_scale() < before
        losses.append(loss.item())
    assert torch.tensor(losses).isfinite().all()
    assert sum(losses[-20:]) < sum(losses[:20]) - 1
    assert all(x.isfinite().all() for x in parameters)
    assert skipped < 20
    if dtype == torch.float16:
        assert skipped > 0  # the first scale is too large on purpose
    assert same(state(quantizer), state(plain))
