"""One step of the state of a codebook (Eq. 7, Sec. 4.3): a look at all codes, and their update.

Every code is divided by a smoothed N, which needs the sum of all N, and a dead code takes the place
of the r-th most chosen one. `survey_kernel` therefore looks at everything and writes into scratch
memory alone; `average_kernel` then updates each code in place, and reads nothing that it writes
elsewhere. Instead of a barrier, every program of the survey adds up all L counts for itself, in the
same order, so that all get the same bits; ranks and jitter are shared out, and only made in a step
that finds a dead code.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvq_kernels.ema import FADED, JITTER
from mmvq_kernels.gpu import launching
from mmvq_kernels.gpu.launching import cdiv
from mmvq_kernels.gpu.scalars import scalar
from mmvq_kernels.statistics import split

_MANY = 8192  # codes; of more, a sort ranks the most chosen in less time than comparisons


@triton.jit
def _mix(z):
    """splitmix64 of uint64, as `mmvq_kernels.hashing.mix`."""
    z = z * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _updates(updating, GROUPS: tl.constexpr):
    """Whether the vectors of each group enter N and o."""
    return (tl.cast(updating, tl.int64) >> tl.arange(0, GROUPS)) & 1 != 0


@triton.jit
def _batch(counts, updating, at, L, G, GROUPS: tl.constexpr):
    """Of codes `at`: counts `[G, L]` of the batch, and their sums over the updating groups."""
    g = tl.arange(0, GROUPS)
    cells = g.to(tl.int64)[:, None] * L + at[None, :]
    n = tl.load(counts + cells, mask=(g < G)[:, None] & (at < L)[None, :], other=0.0)
    n = n.to(tl.float32)
    return n, tl.sum(tl.where(_updates(updating, GROUPS)[:, None], n, 0.0), axis=0)


@triton.jit
def _aged(ages, n, present, at, L, G, GROUPS: tl.constexpr):
    """The ages of codes `at` after a batch with counts n, in which groups `present` had vectors."""
    g = tl.arange(0, GROUPS)
    cells = g.to(tl.int64)[:, None] * L + at[None, :]
    age = tl.load(ages + cells, mask=(g < G)[:, None] & (at < L)[None, :], other=-1)
    return tl.where(present[:, None], tl.where(n > 0, 0, tl.maximum(age, 0) + 1), age)


@triton.jit
def _dead(
    dead, ages, n, present, updating, at, L, G, patience, RESET: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """Which of codes `at` are dead: as given, or by their ages in the updating groups."""
    died = at < 0
    if RESET == "given":
        died = tl.load(dead + at, mask=at < L, other=0) != 0
    if RESET == "all" or RESET == "any":
        age = _aged(ages, n, present, at, L, G, GROUPS)
        seen = _updates(updating, GROUPS)[:, None] & (age > -1)
        age = age.to(tl.float32)
        died = tl.max((seen & (age >= patience)).to(tl.int32), axis=0) > 0
        if RESET == "any":
            alive = tl.max((seen & (age < patience)).to(tl.int32), axis=0)
            died = died & (alive == 0)
    return died


@triton.jit
def survey_kernel(
    codes,  # fp32 [L, D]
    counts,  # fp32 [L]
    ages,  # int64 [G, L], or None
    steps,  # int64 [1], or None
    batch_counts,  # [G, L]
    dead,  # uint8 [L], or None
    order,  # int64 [L], out unless RANKED: the codes, the most chosen first
    masses,  # fp32 [L], out: N after the step
    places,  # int32 [L], out: of a dead code its rank among them, -1: keeps its e, -2: does not
    spread,  # fp32 [D], out: the jitter of the replacements, by dimension; the scale of e follows
    facts,  # int64 [3 + GROUPS], out: rows that move, codes chosen, steps, groups present
    L,
    D,
    G,
    updating,  # a bit for each group whose vectors enter N and o
    decay,
    eps,
    patience,
    share,  # codes of a program, a multiple of BLOCK_L
    POINTERS: tl.constexpr,  # whether decay, eps and patience are pointers
    RESET: tl.constexpr,  # "none", "given": dead, "all" or "any": by the ages
    RANKED: tl.constexpr,
    FADED: tl.constexpr,  # times eps: a mean N that is too small for a reset code
    JITTER: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,  # codes that are looked at together
    BLOCK_J: tl.constexpr,  # codes that others are compared with
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Per program, `share` codes, and BLOCK_D columns of the jitter."""
    decay, eps = scalar(decay, POINTERS), scalar(eps, POINTERS)
    if RESET == "all" or RESET == "any":
        patience = scalar(patience, POINTERS)
    gain = 1 - decay
    g = tl.arange(0, GROUPS)
    first = tl.program_id(0) * share
    tile = tl.zeros([GROUPS, BLOCK], tl.float32)
    for start in tl.range(0, L, BLOCK):
        n, _ = _batch(batch_counts, updating, start + tl.arange(0, BLOCK), L, G, GROUPS)
        tile += n
    of_group = tl.sum(tile, axis=1)
    present = of_group > 0
    entering = tl.sum(tl.where(_updates(updating, GROUPS), of_group, 0.0), axis=0)
    end = tl.where(entering > 0, L, 0)  # a batch without a vector moves nothing

    moved = tl.zeros([BLOCK], tl.float32)
    moved_dead = tl.zeros([BLOCK], tl.float32)
    chosen = tl.zeros([BLOCK], tl.int32)
    died = tl.zeros([BLOCK], tl.int32)
    earlier = tl.zeros([BLOCK], tl.int32)  # dead codes before those of this program
    for start in tl.range(0, L, BLOCK):
        at = start + tl.arange(0, BLOCK)
        n, joint = _batch(batch_counts, updating, at, L, G, GROUPS)
        is_dead = _dead(dead, ages, n, present, updating, at, L, G, patience, RESET, GROUPS)
        is_dead = is_dead & (at < end)
        mass = decay * tl.load(counts + at, mask=at < L, other=0.0) + gain * joint
        moved += mass
        moved_dead += tl.where(is_dead, mass, 0.0)
        chosen += (joint > 0).to(tl.int32)
        died += is_dead.to(tl.int32)
        earlier += (is_dead & (at < first)).to(tl.int32)
    deaths = tl.sum(died, axis=0)
    mean = tl.sum(moved_dead, axis=0) / tl.maximum(deaths.to(tl.float32), 1.0)
    mass_of_dead = tl.maximum(mean, tl.where(mean > FADED * eps, 0.0, gain))
    total = tl.sum(moved, axis=0) + (mass_of_dead - mean) * deaths.to(tl.float32)
    rank = tl.sum(earlier, axis=0)

    for start in tl.range(first, tl.minimum(first + share, L), BLOCK_L):
        at = start + tl.arange(0, BLOCK_L)
        n, joint = _batch(batch_counts, updating, at, L, G, GROUPS)
        is_dead = _dead(dead, ages, n, present, updating, at, L, G, patience, RESET, GROUPS)
        is_dead = is_dead & (at < end)
        mass = decay * tl.load(counts + at, mask=at < L, other=0.0) + gain * joint
        tl.store(masses + at, tl.where(is_dead, mass_of_dead, mass), mask=at < L)
        place = rank + tl.cumsum(is_dead.to(tl.int32), axis=0) - 1
        place = tl.where(is_dead, place, tl.where(joint > 0, -2, -1))
        tl.store(places + at, place, mask=at < L)
        rank += tl.sum(is_dead.to(tl.int32), axis=0)
        if RESET == "all" or RESET == "any":
            if not RANKED:
                if (deaths > 0) & (tl.max(joint, axis=0) > 0):
                    before = tl.zeros([BLOCK_L], tl.int32)
                    for other in tl.range(0, L, BLOCK_J):
                        j = other + tl.arange(0, BLOCK_J)
                        _, theirs = _batch(batch_counts, updating, j, L, G, GROUPS)
                        ahead = theirs[None, :] > joint[:, None]
                        equal = theirs[None, :] == joint[:, None]
                        ahead = ahead | (equal & (j[None, :] < at[:, None]))
                        before += tl.sum(ahead.to(tl.int32), axis=1)
                    tl.store(order + before, at.to(tl.int64), mask=joint > 0)

    if RESET == "all" or RESET == "any":
        if deaths > 0:
            for start in tl.range(tl.program_id(0) * BLOCK_D, D, tl.num_programs(0) * BLOCK_D):
                columns = start + tl.arange(0, BLOCK_D)
                sums = tl.zeros([BLOCK, BLOCK_D], tl.float32)
                for row in tl.range(0, L, BLOCK):
                    rows = row + tl.arange(0, BLOCK).to(tl.int64)
                    inside = (rows < L)[:, None] & (columns < D)[None, :]
                    cells = rows[:, None] * D + columns[None, :]
                    sums += tl.load(codes + cells, mask=inside, other=0.0)
                centre = tl.sum(sums, axis=0) / L
                squares = tl.zeros([BLOCK, BLOCK_D], tl.float32)
                for row in tl.range(0, L, BLOCK):
                    rows = row + tl.arange(0, BLOCK).to(tl.int64)
                    inside = (rows < L)[:, None] & (columns < D)[None, :]
                    cells = rows[:, None] * D + columns[None, :]
                    e = tl.load(codes + cells, mask=inside, other=0.0)
                    off = tl.where(inside, e - centre[None, :], 0.0)
                    squares += off * off
                deviation = tl.sqrt(tl.sum(squares, axis=0) / L)
                tl.store(spread + columns, deviation * JITTER, mask=columns < D)
    if tl.program_id(0) == 0:
        tl.store(spread + D, total / (total + L * eps))
        tl.store(facts, end.to(tl.int64))
        tl.store(facts + 1, tl.maximum(tl.sum(chosen, axis=0), 1).to(tl.int64))
        if steps is not None:
            tl.store(facts + 2, tl.load(steps))
        tl.store(facts + 3 + g, present.to(tl.int64))


@triton.jit
def average_kernel(
    codes,  # fp32 [L, D], written, as all that follow down to steps
    sums,  # fp32 [L, D]
    counts,  # fp32 [L]
    ages,  # int64 [G, L], or None
    usage,  # int64 [G, L], or None
    steps,  # int64 [1], or None
    batch_counts,  # [G, L]
    batch_sums,  # [L, D]
    replacement,  # [L, D], or None
    order,  # from the survey, as all that follow
    masses,
    places,
    spread,
    facts,
    L,
    D,
    G,
    updating,
    decay,
    eps,
    POINTERS: tl.constexpr,
    RESET: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Per program, BLOCK codes by BLOCK_D columns; of the first columns, their integers too."""
    decay, eps = scalar(decay, POINTERS), scalar(eps, POINTERS)
    gain = 1 - decay
    g = tl.arange(0, GROUPS)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    moves = at < tl.load(facts)
    mass = tl.load(masses + at, mask=at < L, other=0.0)
    place = tl.load(places + at, mask=at < L, other=-1)
    is_dead = place >= 0
    smoothed = (mass + eps) * tl.load(spread + D)
    cells = at.to(tl.int64)[:, None] * D + columns[None, :]
    inside = moves[:, None] & (columns < D)[None, :]
    s = tl.load(batch_sums + cells, mask=inside, other=0.0).to(tl.float32)
    new = decay * tl.load(sums + cells, mask=inside, other=0.0) + gain * s
    there = inside & is_dead[:, None]
    if RESET == "given":
        revived = tl.load(replacement + cells, mask=there, other=0.0).to(tl.float32)
        new = tl.where(is_dead[:, None], revived * smoothed[:, None], new)
    if RESET == "all" or RESET == "any":
        if tl.max(place, axis=0) >= 0:
            donor = tl.load(order + place % tl.load(facts + 1), mask=is_dead, other=0)
            _, given = _batch(batch_counts, updating, donor, L, G, GROUPS)
            source = donor[:, None] * D + columns[None, :]
            means = tl.load(batch_sums + source, mask=there, other=0.0).to(tl.float32)
            means = means / tl.maximum(given, 1.0)[:, None]
            keys = _mix(at.to(tl.uint64) + _mix(tl.load(facts + 2).to(tl.uint64)))
            factors = _mix(columns.to(tl.uint64)) | 1
            uniform = (keys[:, None] * factors[None, :]).to(tl.int64, bitcast=True) >> 40
            jitter = tl.load(spread + columns, mask=columns < D, other=0.0)
            revived = means + uniform.to(tl.float32) * jitter[None, :]
            new = tl.where(is_dead[:, None], revived * smoothed[:, None], new)
    tl.store(sums + cells, new, mask=inside)
    changed = (place != -1) & (smoothed > 0)  # a code that no vector chose, or without mass, stays
    e = tl.div_rn(new, tl.broadcast_to(smoothed[:, None], new.shape))
    tl.store(codes + cells, e, mask=inside & changed[:, None])
    if tl.program_id(1) == 0:
        tl.store(counts + at, mass, mask=moves)
        if ages is not None:
            present = tl.load(facts + 3 + g) != 0
            n, _ = _batch(batch_counts, updating, at, L, G, GROUPS)
            age = _aged(ages, n, present, at, L, G, GROUPS)
            age = tl.where(is_dead[None, :] & (age >= 0), 0, age)
            numbers = g.to(tl.int64)[:, None] * L + at[None, :]
            exist = (g < G)[:, None] & (at < L)[None, :]
            used = tl.load(usage + numbers, mask=exist, other=0)
            tl.store(ages + numbers, age, mask=exist)
            tl.store(usage + numbers, used + n.to(tl.int64), mask=exist)
            if tl.program_id(0) == 0:
                tl.store(steps, tl.load(facts + 2) + 1)


def update_(
    codes: Tensor,
    sums: Tensor,
    counts: Tensor,
    batch_sums: Tensor,
    batch_counts: Tensor,
    decay: float,
    eps: float,
    dead: Tensor | None,
    replacement: Tensor | None,
) -> None:
    """`mmvq_kernels.ema_update_` on a GPU, for float32 state."""
    batch = batch_counts.contiguous().view(1, -1), batch_sums.contiguous()
    dead = launching.as_bytes(dead)
    replacement = replacement.contiguous() if replacement is not None else None
    reset = "none" if dead is None else "given"
    _step_([codes, sums, counts], *batch, 1, decay, eps, 0.0, reset, dead, replacement)


def step_(
    codes: Tensor,
    sums: Tensor,
    counts: Tensor,
    ages: Tensor,
    usage: Tensor,
    steps: Tensor,
    batch: Tensor,
    decay: float,
    eps: float,
    reset_after: float | None,
    reset_rule: str,
    update_from: list[int] | None,
) -> None:
    """`mmvq.functional.ema.step_` on a GPU, for float32 state."""
    (L, D), G = codes.shape, len(ages)
    updating = sum(1 << g for g in (range(G) if update_from is None else update_from))
    state = [codes, sums, counts, ages, usage, steps.view(1)]
    reset, patience = (reset_rule, reset_after) if reset_after is not None else ("none", 0.0)
    _step_(state, *split(batch, G, L, D), updating, decay, eps, patience, reset)


def _step_(
    written: list[Tensor],
    batch_counts: Tensor,
    batch_sums: Tensor,
    updating: int,
    decay: float,
    eps: float,
    patience: float,
    reset: str,
    dead: Tensor | None = None,
    replacement: Tensor | None = None,
) -> None:
    state = [x.contiguous() for x in written]
    codes, sums, counts, *integers = state
    ages, usage, steps = integers or (None, None, None)
    (L, D), G = codes.shape, len(batch_counts)
    if codes.numel() == 0:
        return
    ranked = reset in ("all", "any") and L > _MANY
    order = codes.new_empty(L, dtype=torch.long)
    if ranked:
        joint = torch.stack([batch_counts[g] for g in range(G) if updating >> g & 1]).sum(0)
        order = joint.argsort(descending=True, stable=True)
    groups = triton.next_power_of_2(G)
    masses, spread = codes.new_empty(L), codes.new_empty(D + 1)
    places, facts = order.new_empty(L, dtype=torch.int32), order.new_empty(3 + groups)
    found = order, masses, places, spread, facts
    numbers = L, D, G, updating, decay, eps
    options = {"POINTERS": isinstance(decay, Tensor), "RESET": reset, "GROUPS": groups}
    block = max(16, min(2048, triton.next_power_of_2(L)) // groups)
    programs = min(cdiv(L, 32), launching.processors(codes))
    share = 32 * cdiv(cdiv(L, 32), programs)
    launching.launch(
        survey_kernel,
        (cdiv(L, share),),
        codes,
        counts,
        ages,
        steps,
        batch_counts,
        dead,
        *found,
        *numbers,
        patience,
        share,
        RANKED=ranked,
        FADED=FADED,
        JITTER=JITTER,
        BLOCK=block,
        BLOCK_J=min(128, block),
        BLOCK_L=32,
        BLOCK_D=8,
        **options,
        num_warps=16,
        maxnreg=128,  # the compiler would take fewer, and spill
    )
    block_d = min(128, max(4, triton.next_power_of_2(D)))
    block = min(2048 // block_d, max(16, 1024 // groups))
    launching.launch(
        average_kernel,
        (cdiv(L, block), cdiv(D, block_d)),
        *(codes, sums, counts, ages, usage, steps, batch_counts, batch_sums, replacement),
        *found,
        *numbers,
        BLOCK=block,
        BLOCK_D=block_d,
        **options,
        num_warps=8,
    )
    for mine, theirs in zip(state, written, strict=True):  # of a strided one a copy
        if mine is not theirs:
            theirs.copy_(mine)
