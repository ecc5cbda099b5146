"""How dead codes come back: which, where, and that they stay; what the others notice: nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties.strategies import EPS, NAMES, Draw, draws, every_wiring, pending
from support import close, state
from torch import Tensor

from mmvq.functional import laplace_smoothing

RULES = st.sampled_from(("all", "any"))
STATE = ("codes", "sums", "counts")


def chosen(indices: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """Which codes each modality chose, bool `[L]`."""
    return {n: torch.isin(torch.arange(size), index) for n, index in indices.items()}


@every_wiring
@given(draw=draws(), reset_after=st.integers(1, 3), rule=RULES)
def test_dead_codes_move_and_no_other(
    names: Sequence[str], partner: Any, draw: Draw, reset_after: int, rule: Any
) -> None:
    """Against the rule written out, and a twin that never resets.

    A dead code takes the mean of the batch at one of the most chosen codes, within 1% of the
    spread of the codebook, and the mean mass of the dead; total mass and living codes stay.
    """
    settings: dict[str, Any] = {"partner": partner, "reset_rule": rule}
    module = draw.quantizer(names, **settings, reset_after=reset_after)
    book = module.ema_codebook
    age = {name: torch.zeros(draw.L) for name in names}  # batches since chosen, or since reset
    for step in range(4):
        z, before = draw.features(names, step), state(book)
        twin = draw.quantizer(names, **settings, update="manual")
        twin.ema_codebook.load_state_dict(before)
        twin(z)
        statistics, n, sums = pending(twin)
        twin.ema_codebook.update_(statistics)
        indices = module(z).indices
        for name, used in chosen(indices, draw.L).items():
            age[name] = torch.where(used, 0, age[name] + 1)
        idle = torch.stack([age[name] >= reset_after for name in names])
        dead = idle.any(0) if rule == "all" else idle.all(0)
        for key in STATE:
            kept, untouched = getattr(book, key)[~dead], getattr(twin.ema_codebook, key)[~dead]
            assert torch.equal(kept, untouched)
        age = {name: torch.where(dead, 0, a) for name, a in age.items()}
        if not dead.any():
            continue

        mass = twin.ema_codebook.counts
        rounding = draw.L * EPS * float(mass.sum())
        close(book.counts[dead], mass[dead].mean().expand(int(dead.sum())), rounding)
        close(book.counts.sum(), mass.sum(), rounding)
        n = n.sum(0)
        crowded = n.argsort(descending=True, stable=True)[: int((n > 0).sum())][: int(dead.sum())]
        means = sums[crowded] / n[crowded, None]
        jitter = (book.codes[dead][:, None] - means).abs()  # [dead, crowded, D]
        spread = 0.01 * before["codes"].std(0, correction=0)
        assert (jitter <= spread + draw.slack(z)).all(-1).any(1).all()
        if draw.L > 1:
            assert len(book.codes[dead].unique(dim=0)) == dead.sum()


@every_wiring
@given(draw=draws(), eps=st.sampled_from((0.0, 1e-5)), rule=RULES)
def test_a_reset_code_is_still_there_at_the_next_step(
    names: Sequence[str], partner: Any, draw: Draw, eps: float, rule: Any
) -> None:
    """It then moves as any code does: e' = (decay N~ e + (1 - decay) s) / N~', from where it is.

    Not chosen, it stays; N~ is the smoothed mass. 317 codes for at most 3 steps of 105 vectors:
    some are dead by the second step and not chosen in the third.
    """
    draw = replace(draw, L=317)
    settings: dict[str, Any] = {"partner": partner, "reset_rule": rule, "eps": eps}
    module = draw.quantizer(names, **settings, reset_after=2)
    book = module.ema_codebook
    used = [chosen(module(draw.features(names, step)).indices, draw.L) for step in range(2)]
    never = torch.stack([~(used[0][name] | used[1][name]) for name in names])
    dead = never.any(0) if rule == "all" else never.all(0)
    assert dead.any()

    before, z = state(book), draw.features(names, 2)
    twin = draw.quantizer(names, **settings, update="manual")
    twin.ema_codebook.load_state_dict(before)
    now = torch.stack([*chosen(twin(z).indices, draw.L).values()]).any(0)
    _, n, sums = pending(twin)
    counts = 0.9 * before["counts"] + 0.1 * n.sum(0)
    old, new = (laplace_smoothing(N, eps)[:, None] for N in (before["counts"], counts))
    wanted = (0.9 * old * before["codes"] + 0.1 * sums) / new
    module(z)
    atol = 2 * draw.slack(z)
    close(book.codes[dead & now], wanted[dead & now], atol)
    assert (dead & ~now).any()
    assert torch.equal(book.codes[dead & ~now], before["codes"][dead & ~now])


@pytest.mark.parametrize("names", [NAMES[:2], NAMES])
@given(draw=draws(), rule=RULES)
def test_a_modality_never_seen_does_not_vote(names: Sequence[str], draw: Draw, rule: Any) -> None:
    """Trained on one modality, a quantizer of many resets just as a quantizer of that one does."""
    settings: dict[str, Any] = {"partner": "none", "reset_after": 1, "reset_rule": rule}
    many, one = draw.quantizer(names, **settings), draw.quantizer(names[:1], **settings)
    for step in range(3):
        z = draw.features(names[:1], step)
        many(z)
        one(z)
        for key in STATE:
            assert torch.equal(getattr(many.ema_codebook, key), getattr(one.ema_codebook, key))


@given(draw=draws())
def test_training_on_pairs_does_not_reset_the_codebook(draw: Draw) -> None:
    """A modality that is absent does not age, masked or left out: its codes stay used.

    Each pair is trained for `reset_after` batches; every modality chooses every code in its own.
    """
    first, second, third = NAMES
    module = draw.quantizer(NAMES, partner="none", decay=1.0, reset_after=4)
    book = module.ema_codebook
    every = {name: book.codes.expand(2, -1, -1).clone() for name in NAMES}
    for absent in (third, second, first) * 2:
        for batch in range(4):
            pair = {name: x for name, x in every.items() if name != absent}
            if batch % 2:
                module(pair)
            else:
                present = {n: torch.full((2, draw.L), n != absent) for n in NAMES}
                module(every, present)
            close(module.codebook, draw.codes(), draw.slack(every))
            assert not (book.ages > 0).any()


@given(draw=draws())
def test_only_update_from_votes(draw: Draw) -> None:
    """A modality that does not move the codebook does not keep codes alive or kill them."""
    names = NAMES[:2]
    settings: dict[str, Any] = {"partner": "none", "reset_after": 1}
    module = draw.quantizer(names, update_from=names[:1], **settings)
    alone = draw.quantizer(names[:1], **settings)
    for step in range(3):
        z = draw.features(names, step)
        module(z)
        alone({names[0]: z[names[0]]})
        for key in STATE:
            assert torch.equal(getattr(module.ema_codebook, key), getattr(alone.ema_codebook, key))
