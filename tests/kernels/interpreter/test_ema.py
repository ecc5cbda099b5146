"""The kernels of the moving average against the torch path in float64.

ATOL: counts of at least 0.5 and sums below 10 give codes below 20; a dozen roundings, and D or L
more where a sum over codes is involved, bound the error.
"""

from __future__ import annotations

import pytest
import torch
from kernels.draws import average, batch, faded
from support import close, rounding, strided, uniform
from torch import Tensor

from mmvq.functional.ema import step_torch_
from mmvq_kernels.ema import update_torch_
from mmvq_kernels.gpu import ema, launching
from mmvq_kernels.gpu.ema import step_, update_

# one of all, primes, more than a block of columns, of codes
SIZES = [(1, 1), (9, 4), (101, 13), (7, 257), (5, 1024), (4100, 1)]
CASES = [(L, D, 0.9, 1e-3) for L, D in SIZES]
CASES += [(9, 4, 0.99, 1e-5), (9, 4, 0.0, 0.1), (9, 4, 1.0, 0.0)]
CASES += [(20_000, 4, 0.9, 1e-5)]


def reset(L: int, D: int, device: str) -> tuple[Tensor, Tensor]:
    dead = (torch.arange(L) % 3 == 0) & (torch.arange(L) > 0)
    replacement = torch.where(dead[:, None], uniform(L, D, dtype=torch.float32, seed=5), torch.nan)
    return dead.to(device), replacement.to(device)


@pytest.mark.parametrize(("L", "D", "decay", "eps"), CASES)
@pytest.mark.parametrize("with_reset", [False, True])
def test_equals_the_torch_path_in_float64(
    L: int,
    D: int,
    with_reset: bool,
    decay: float,
    eps: float,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if L > 10_000:  # two programs are enough to interpret
        monkeypatch.setattr(launching, "processors", lambda like: 1)
    mine = average(L, D, device)
    wanted = tuple(x.double() for x in mine)
    dead, replacement = reset(L, D, device) if with_reset else (None, None)
    update_(*mine, *batch(L, D, device), decay, eps, dead, replacement)
    update_torch_(*wanted, *batch(L, D, device), decay, eps, dead, replacement)
    atol = rounding(torch.float32, 12 + L.bit_length(), 20)
    for name, a, b in zip(("codes", "sums", "counts"), mine, wanted, strict=True):
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite), name
        scale = max(1.0, b[finite].abs().max().item() / 20)
        close(a[finite].cpu(), b[finite].cpu(), atol * scale)


@pytest.mark.parametrize("nobody", [False, True])
def test_a_reset_moves_the_dead_alone(nobody: bool, device: str) -> None:
    L, D = 40, 5
    dead, replacement = reset(L, D, device)
    dead &= not nobody
    plain, after = average(L, D, device), average(L, D, device)
    update_(*plain, *batch(L, D, device), 0.9, 1e-3, None, None)
    update_(*after, *batch(L, D, device), 0.9, 1e-3, dead, replacement)
    for mine, other in zip(after, plain, strict=True):
        assert torch.equal(mine[~dead], other[~dead])
    close(after[0][dead].cpu(), replacement[dead].cpu(), rounding(torch.float32, 3, 1))


@pytest.mark.parametrize("times", [0.0, 1.5, 100.0, 990.0, 1010.0, 1e4])
def test_up_to_1000_eps_the_mass_of_reset_codes_is_that_of_a_vector(
    times: float, device: str
) -> None:
    """Their mean N after the step is `times` eps; above 1000 it stays, as no mass is made."""
    L, D, decay, eps = 40, 5, 0.9, 1e-6
    dead, replacement = reset(L, D, device)
    mine, (sums, counts) = average(L, D, device), batch(L, D, device)
    faded(mine, dead, times * eps / decay)
    sums[dead] = counts[dead] = 0
    wanted = tuple(x.double() for x in mine)
    update_(*mine, sums, counts, decay, eps, dead, replacement)
    update_torch_(*wanted, sums, counts, decay, eps, dead, replacement)
    for a, b in zip(mine, wanted, strict=True):
        close(a.cpu(), b.cpu(), rounding(torch.float32, 18, 20))
    mass = times * eps if times > 1000 else 1 - decay
    # a sum of 13 counts more than the dozen roundings of the others
    exact = torch.full((int(dead.sum()),), mass)
    close(mine[2][dead].cpu(), exact, rounding(torch.float32, 12 + 13, mass))


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_without_smoothing_a_code_without_mass_stays(decay: float, device: str) -> None:
    """With eps = 0 there is nothing to divide by: faded, chosen where nothing is gained, or dead.

    Of the dead, whose N is 1 - decay at least, only a decay of 1 leaves one without mass.
    """
    codes = torch.arange(1.0, 9.0).view(4, 2)
    sums, counts = codes * torch.tensor([[2.0], [0.0], [0.0], [0.0]]), torch.tensor([2.0, 0, 0, 0])
    batch_sums, batch_counts = 3 * torch.ones(4, 2), torch.tensor([1.0, 0, 1.0, 0])
    batch_sums[[1, 3]] = 0
    dead = torch.tensor([False, False, False, True])
    replacement = torch.full((4, 2), 9.0)
    mine = [x.to(device) for x in (codes.clone(), sums, counts)]
    rest = [x.to(device) for x in (batch_sums, batch_counts)]
    update_(*mine, *rest, decay, 0.0, dead.to(device), replacement.to(device))
    first = [(2 * e * decay + 3 * (1 - decay)) / (1 + decay) for e in (1, 2)]
    wanted = [first, [3, 4], [3, 3], [9, 9]] if decay < 1 else [first, [3, 4], [5, 6], [7, 8]]
    close(mine[0].cpu(), torch.tensor(wanted), rounding(torch.float32, 12, 9))


@pytest.mark.parametrize("with_reset", [False, True])
def test_same_bits_for_any_number_of_programs(
    with_reset: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sums the counts for itself, and counts that another has moved must not enter."""
    L, D = 1000, 13
    dead, replacement = reset(L, D, device) if with_reset else (None, None)
    runs = []
    for processors in (132, 1, 2):
        monkeypatch.setattr(launching, "processors", lambda like, n=processors: n)
        runs.append(average(L, D, device))
        update_(*runs[-1], *batch(L, D, device), 0.9, 1e-3, dead, replacement)
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("with_reset", [False, True])
def test_a_batch_without_a_vector_changes_no_bit(with_reset: bool, device: str) -> None:
    L, D = 40, 5
    after = average(L, D, device)
    nothing = torch.zeros(L, D, device=device), torch.zeros(L, device=device)
    dead, replacement = reset(L, D, device) if with_reset else (None, None)
    update_(*after, *nothing, 0.9, 1e-5, dead, replacement)
    for mine, before in zip(after, average(L, D, device), strict=True):
        assert torch.equal(mine, before)


def test_strided_state_and_other_dtypes(device: str) -> None:
    L, D = 40, 5
    plain, gaps = average(L, D, device), average(L, D, device)
    sums, counts = batch(L, D, device)
    update_(*plain, sums, counts, 0.9, 1e-5, None, None)
    codes, own_sums = strided(gaps[0]), strided(gaps[1])
    update_(codes, own_sums, gaps[2], strided(sums.double()), counts.long(), 0.9, 1e-5, None, None)
    for mine, other in zip((codes, own_sums, gaps[2]), plain, strict=True):
        assert torch.equal(mine, other)


def state(G: int, L: int, D: int, device: str) -> list[Tensor]:
    """A state in which group 0 has not been seen yet."""
    generator = torch.Generator().manual_seed(L)
    ages = torch.randint(0, 6, (G, L), generator=generator)
    ages[0] = -1
    usage = torch.randint(0, 99, (G, L), generator=generator)
    return [*average(L, D, device), ages.to(device), usage.to(device), torch.tensor(7).to(device)]


def statistics(G: int, L: int, D: int, nobody: bool = False) -> Tensor:
    """Flat counts, most of them 0 and many equal, and sums; the last group has no vector."""
    generator = torch.Generator().manual_seed(D)
    counts = torch.randint(-6, 4, (G, L), generator=generator).clamp(min=0).float()
    counts[G - 1] = 0
    counts *= not nobody
    sums = uniform(L, D, dtype=torch.float32, seed=4) * counts.sum(0)[:, None]
    return torch.cat([counts.flatten(), sums.flatten()])


def check_step(
    G: int, L: int, D: int, device: str, *settings: object, nobody: bool = False
) -> None:
    mine, batch = state(G, L, D, device), statistics(G, L, D, nobody).to(device)
    wanted = [x.double() if x.is_floating_point() else x.clone() for x in mine]
    step_(*mine, batch, 0.9, 1e-3, *settings)
    step_torch_(*wanted, batch.double(), 0.9, 1e-3, *settings)
    for a, b in zip(mine[:3], wanted[:3], strict=True):
        close(a.cpu(), b.cpu(), rounding(torch.float32, 20 + L.bit_length(), 20))
    for a, b in zip(mine[3:], wanted[3:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", ["all", "any"])
@pytest.mark.parametrize("patience", [None, 1.0, 4.0])
@pytest.mark.parametrize("sources", [None, [1], [0, 2]])
def test_a_step_is_that_of_the_torch_path(
    rule: str, patience: float | None, sources: list[int] | None, device: str
) -> None:
    check_step(3, 101, 13, device, patience, rule, sources)


@pytest.mark.parametrize(("G", "L", "D"), [(1, 1, 1), (2, 400, 256), (5, 1100, 3), (62, 9, 4)])
def test_a_step_of_any_size(G: int, L: int, D: int, device: str) -> None:
    check_step(G, L, D, device, 2.0, "any", None)


@pytest.mark.parametrize("sources", [None, [1, 2]])
def test_many_codes_are_ranked_by_a_sort(
    sources: list[int] | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ema, "_MANY", 0)
    check_step(3, 101, 13, device, 1.0, "all", sources)


@pytest.mark.parametrize("sources", [None, [2]])
def test_a_step_without_a_vector_that_moves_a_code(sources: list[int] | None, device: str) -> None:
    check_step(3, 101, 13, device, 1.0, "all", sources, nobody=sources is None)


def test_same_bits_of_a_step_for_any_number_of_programs(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for processors in (132, 1, 3):
        monkeypatch.setattr(launching, "processors", lambda like, n=processors: n)
        runs.append(state(2, 300, 13, device))
        step_(*runs[-1], statistics(2, 300, 13).to(device), 0.9, 1e-3, 1.0, "all", None)
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("patience", [None, 1.0])
def test_numbers_of_a_step_may_be_tensors(patience: float | None, device: str) -> None:
    """As graphs of torch.compile pass them."""
    plain, other = state(3, 101, 13, device), state(3, 101, 13, device)
    batch = statistics(3, 101, 13).to(device)
    numbers = 0.875, 2**-10, patience
    tensors = [None if x is None else torch.tensor(x, device=device) for x in numbers]
    step_(*plain, batch, *numbers, "all", None)
    step_(*other, batch, *tensors, "all", None)
    for a, b in zip(plain, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("D", [4, 16, 20])
def test_a_step_with_the_tiles_of_amd(D: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid that was made for tiles of another size would leave codes as they are."""
    monkeypatch.setattr(launching, "amd", lambda like: "gfx942")
    check_step(2, 300, D, device, 1.0, "all", None)


@pytest.mark.parametrize("G", [33, 62])
def test_many_groups(G: int, device: str) -> None:
    check_step(G, 45, 4, device, 1.0, "all", [0, G - 2])
