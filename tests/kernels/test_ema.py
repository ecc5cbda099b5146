"""The in-place update: its reset, and what it must leave alone.

ATOL: as for `functional.ema_update_ref`, with which the step without reset is compared in
tests/functional; counts of at least 0.5 and sums below 10 give codes below 20, a dozen roundings of
which bound the error.
"""

from __future__ import annotations

import pytest
import torch
from kernels import draws
from support import close, rounding, uniform
from torch import Tensor

from mmvq_kernels import ema_update_

L, D = 9, 4
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
DEAD = torch.tensor([i in (0, 3, 7) for i in range(L)])


def state(dtype: torch.dtype) -> draws.State:
    return draws.average(L, D, dtype=dtype)


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return draws.batch(L, D, dtype=dtype)


def batch_of_the_living(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    sums, counts = batch(dtype)
    sums[DEAD] = counts[DEAD] = 0
    return sums, counts


def replacement(dtype: torch.dtype) -> Tensor:
    return uniform(L, D, dtype=dtype, seed=5)


def smoothed(counts: Tensor, eps: float) -> Tensor:
    return (counts + eps) / (counts.sum() + L * eps) * counts.sum()


@FLOATS
def test_a_reset_code_is_its_replacement_and_the_others_do_not_move(dtype: torch.dtype) -> None:
    atol = rounding(dtype, 12, 20)
    plain, reset, new = state(dtype), state(dtype), replacement(dtype)
    ema_update_(*plain, *batch(dtype), decay=0.9, eps=1e-3)
    ema_update_(*reset, *batch(dtype), decay=0.9, eps=1e-3, dead=DEAD, replacement=new)
    codes, sums, counts = reset
    for mine, other in zip(reset, plain, strict=True):
        assert torch.equal(mine[~DEAD], other[~DEAD])
    close(codes[DEAD], new[DEAD], atol)
    close(counts[DEAD], plain[2][DEAD].mean().expand(3), atol)
    close(counts.sum(), plain[2].sum(), rounding(dtype, L, 60))
    close(codes * smoothed(counts, 1e-3)[:, None], sums, atol * 6)  # e = o / smoothed(N), all rows


@FLOATS
def test_a_reset_code_survives_the_next_step(dtype: torch.dtype) -> None:
    """A vector that lies on the code moves it only if its o and N do not fit together."""
    after, new = state(dtype), replacement(dtype)
    args, settings = batch_of_the_living(dtype), {"decay": 0.9, "eps": 0.0}
    ema_update_(*after, *args, **settings, dead=DEAD, replacement=new)
    ema_update_(*after, torch.where(DEAD[:, None], new, 0), DEAD.to(dtype), **settings)
    close(after[0][DEAD], new[DEAD], rounding(dtype, 24, 20))


@FLOATS
@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_a_reset_code_without_mass_survives_the_next_step(dtype: torch.dtype, decay: float) -> None:
    """It has the weight 1 - decay of one vector: a vector at 0 moves it by 1 / (1 + decay).

    This weight moves the total, so the living codes move too: by at most L eps of their size.
    """
    plain, reset, new = state(dtype), state(dtype), replacement(dtype)
    for each in (plain, reset):
        draws.faded(each, DEAD, 1e-20)
    args = batch_of_the_living(dtype)
    ema_update_(*plain, *args, decay=decay)
    ema_update_(*reset, *args, decay=decay, dead=DEAD, replacement=new)
    codes, sums, counts = reset
    atol = rounding(dtype, 12, 20)
    close(codes[DEAD], new[DEAD], atol)
    close(codes * smoothed(counts, 1e-5)[:, None], sums, atol * 6)
    close(codes[~DEAD], plain[0][~DEAD], atol + 20 * L * 1e-5)
    ema_update_(*reset, torch.zeros_like(sums), DEAD.to(dtype), decay=decay)
    smoothing = 1e-5 / (1 - decay)  # eps over N
    close(codes[DEAD], new[DEAD] * decay / (1 + decay), atol + 20 * 2 * smoothing)


@FLOATS
@pytest.mark.parametrize("times", [0.0, 1.5, 100.0, 990.0, 1010.0, 1e4])
def test_up_to_1000_eps_the_mass_of_reset_codes_is_that_of_a_vector(
    dtype: torch.dtype, times: float
) -> None:
    """Their mean N after the step is `times` eps; above 1000 it stays, as no mass is made."""
    eps, decay, after = 1e-6, 0.9, state(dtype)
    draws.faded(after, DEAD, times * eps / decay)
    reset = {"dead": DEAD, "replacement": replacement(dtype)}
    ema_update_(*after, *batch_of_the_living(dtype), decay=decay, eps=eps, **reset)
    mass = times * eps if times > 1000 else 1 - decay
    close(after[2][DEAD], torch.full((3,), mass, dtype=dtype), rounding(dtype, 8, mass))


@FLOATS
def test_a_batch_without_a_vector_changes_no_bit(dtype: torch.dtype) -> None:
    after = state(dtype)
    nothing = torch.zeros(L, D, dtype=dtype), torch.zeros(L, dtype=dtype)
    ema_update_(*after, *nothing, decay=0.9, dead=DEAD, replacement=replacement(dtype))
    for mine, before in zip(after, state(dtype), strict=True):
        assert torch.equal(mine, before)


@FLOATS
def test_nobody_dead_is_the_plain_step(dtype: torch.dtype) -> None:
    plain, none = state(dtype), state(dtype)
    ema_update_(*plain, *batch(dtype), decay=0.9)
    nan = torch.full((L, D), torch.nan, dtype=dtype)  # read where dead, and nowhere else
    ema_update_(*none, *batch(dtype), decay=0.9, dead=torch.zeros_like(DEAD), replacement=nan)
    for mine, other in zip(none, plain, strict=True):
        assert torch.equal(mine, other)


def test_decay_has_the_precision_of_the_state() -> None:
    """0.9 as a float32 is off by 2.4e-8, far above what float64 state may lose."""
    _, _, counts = after = state(torch.float64)
    old, (sums, batch_counts) = counts.clone(), batch(torch.float64)
    ema_update_(*after, sums, batch_counts, decay=0.9)
    close(counts, 0.9 * old + 0.1 * batch_counts, rounding(torch.float64, 4, 8))


def test_written_in_place_from_any_dtype() -> None:
    after, other = state(torch.float32), state(torch.float32)
    where = [x.data_ptr() for x in after]
    ema_update_(*after, *batch(torch.float64), decay=0.9)
    assert [x.data_ptr() for x in after] == where
    assert {x.dtype for x in after} == {torch.float32}
    ema_update_(*other, *(x.float() for x in batch(torch.float64)), decay=0.9)
    for mine, same in zip(after, other, strict=True):
        assert torch.equal(mine, same)


def test_without_smoothing_a_code_that_has_faded_stays() -> None:
    codes = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    sums, counts = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([1.0, 0.0])
    batch_sums, batch_counts = torch.tensor([[2.0, 2.0], [0.0, 0.0]]), torch.tensor([1.0, 0.0])
    ema_update_(codes, sums, counts, batch_sums, batch_counts, decay=0.5, eps=0.0)
    assert codes.tolist() == [[1.5, 2.0], [3.0, 4.0]]
