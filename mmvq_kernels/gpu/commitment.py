"""Commitment loss (Eq. 8) and gradient estimator after a search, one launch each way.

`commit_kernel` reads the codes that the search chose, writes them out and adds up the squared
distances of all pairs of modalities; the program that arrives last adds up those of all programs,
in a fixed order. `commit_backward_kernel` gives the gradient of the vectors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvq_kernels.gpu import launching
from mmvq_kernels.gpu.launching import cdiv
from mmvq_kernels.gpu.nearest import arrives_last, search_with_ticket
from mmvq_kernels.gpu.scalars import scalar


@triton.jit
def _fit(valid, at, there):
    fit = there
    if valid is not None:
        fit = fit & (tl.load(valid + at, mask=there, other=0) != 0)
    return fit


@triton.jit
def _total(parts, programs, BLOCK: tl.constexpr):
    """The sum of `parts`, which other programs have written."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, programs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        part = tl.load(parts + at, mask=at < programs, other=0.0, cache_modifier=".cg")
        total += part
    return tl.sum(total, axis=0)


@triton.jit
def commit_kernel(
    rows,  # [M P, D]
    codes,  # [L, D]
    valid,  # uint8 [M P], or None
    index,  # int64 [M P]
    quantized,  # [M P, D], out
    chosen,  # fp32 [M P, D], out: the codes, for the backward pass
    indices,  # int64 [M P], out
    loss,  # fp32 [1], out
    weights,  # fp32 [M, M], out: of the squared distances of each pair
    squares,  # fp32 [M, M, programs]: scratch, as all that follow
    counts,  # fp32 [M, M, programs]
    ticket,  # int32 [1]: 0
    M,
    P,
    D,
    own,
    cross,
    width,  # what a squared norm is divided by
    POINTERS: tl.constexpr,  # whether own and cross are pointers
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per program, BLOCK_P positions of all modalities."""
    own, cross = scalar(own, POINTERS), scalar(cross, POINTERS)
    program, programs = tl.program_id(0), tl.num_programs(0)
    position = program.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    there = position < P
    for a in tl.range(0, M):
        rows_a = tl.cast(a, tl.int64) * P + position
        fit_a = _fit(valid, rows_a, there)
        for b in tl.range(0, M):
            rows_b = tl.cast(b, tl.int64) * P + position
            both = fit_a & _fit(valid, rows_b, there)
            code = tl.load(index + rows_b, mask=there, other=0)
            total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
            for start in tl.range(0, D, BLOCK_D):
                columns = start + tl.arange(0, BLOCK_D)
                inside = there[:, None] & (columns < D)[None, :]
                cells = rows_a[:, None] * D + columns[None, :]
                x = tl.load(rows + cells, mask=inside, other=0.0).to(tl.float32)
                source = code[:, None] * D + columns[None, :]
                e = tl.load(codes + source, mask=inside, other=0.0).to(tl.float32)
                off = tl.where(both[:, None], x - e, 0.0)
                total += off * off
                if a == b:
                    q = tl.where(fit_a[:, None], e + (x - x), 0.0)  # NaN where x is not finite
                    tl.store(quantized + cells, q.to(quantized.dtype.element_ty), mask=inside)
                    tl.store(chosen + cells, e, mask=inside)
            pair = (a * M + b) * programs + program
            tl.store(squares + pair, tl.sum(tl.sum(total, axis=1), axis=0))
            tl.store(counts + pair, tl.sum(both.to(tl.float32), axis=0))
            if a == b:
                tl.store(indices + rows_a, tl.where(fit_a, code, -1), mask=there)
    if arrives_last(ticket, programs):
        sum_ = 0.0
        for a in tl.range(0, M):
            others = 0.0
            for b in tl.range(0, M):
                if a != b:
                    n = _total(counts + (a * M + b) * programs, programs, BLOCK)
                    others += tl.where(n > 0, 1.0, 0.0)
            for b in tl.range(0, M):
                n = _total(counts + (a * M + b) * programs, programs, BLOCK)
                distance = _total(squares + (a * M + b) * programs, programs, BLOCK)
                weight = own / tl.maximum(n * width, 1.0)
                term = weight * distance
                if a != b:
                    weight = cross / tl.maximum(others, 1.0) / tl.maximum(n * width, 1.0)
                    term = tl.where(weight == 0, 0.0, weight * distance)  # not even a NaN
                tl.store(weights + a * M + b, weight)
                sum_ += term
        tl.store(loss, sum_)


@triton.jit
def commit_backward_kernel(
    rows,  # [M P, D]
    chosen,  # fp32 [M P, D]
    valid,  # uint8 [M P], or None
    weights,  # fp32 [M, M]
    of_codes,  # [M P, D], or None
    of_loss,  # fp32 [1], or None
    out,  # [M P, D]
    M,
    P,
    D,
    ROTATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Per program, BLOCK_P positions of one modality."""
    a = tl.program_id(1)
    position = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    there = position < P
    at = tl.cast(a, tl.int64) * P + position
    fit = _fit(valid, at, there)
    if ROTATION and of_codes is not None:
        TINY: tl.constexpr = 1.1754943508222875e-38
        xx = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        ee = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        for start in tl.range(0, D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            inside = fit[:, None] & (columns < D)[None, :]
            cells = at[:, None] * D + columns[None, :]
            x = tl.load(rows + cells, mask=inside, other=0.0).to(tl.float32)
            e = tl.load(chosen + cells, mask=inside, other=0.0)
            xx += x * x
            ee += e * e
        x_norm, e_norm = tl.sqrt(tl.sum(xx, axis=1)), tl.sqrt(tl.sum(ee, axis=1))
        x_least, e_least = tl.maximum(x_norm, TINY), tl.maximum(e_norm, TINY)
        uu = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        gx = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        ge = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        for start in tl.range(0, D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            inside = fit[:, None] & (columns < D)[None, :]
            cells = at[:, None] * D + columns[None, :]
            x = tl.load(rows + cells, mask=inside, other=0.0).to(tl.float32) / x_least[:, None]
            e = tl.load(chosen + cells, mask=inside, other=0.0) / e_least[:, None]
            g = tl.load(of_codes + cells, mask=inside, other=0.0).to(tl.float32)
            u = x + e
            uu += u * u
            gx += g * x
            ge += g * e
        u_norm = tl.sqrt(tl.sum(uu, axis=1))
        along_x, along_e = tl.sum(gx, axis=1), tl.sum(ge, axis=1)
        u_least = tl.maximum(u_norm, TINY)
        along_u = (along_x + along_e) / u_least
        ratio = e_norm / x_norm
        turns = (x_norm > TINY) & (e_norm > TINY) & (u_norm > 1e-3) & (ratio - ratio == 0)
    times = 0.0
    if of_loss is not None:
        times = 2 * tl.load(of_loss)
    for start in tl.range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = there[:, None] & (columns < D)[None, :]
        cells = at[:, None] * D + columns[None, :]
        x = tl.load(rows + cells, mask=inside, other=0.0).to(tl.float32)
        grad = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        if of_codes is not None:
            grad = tl.load(of_codes + cells, mask=inside & fit[:, None], other=0.0).to(tl.float32)
            if ROTATION:
                e = tl.load(chosen + cells, mask=inside, other=0.0)
                x_hat = x / x_least[:, None]
                u = (x_hat + e / e_least[:, None]) / u_least[:, None]
                turned = grad - 2 * u * along_u[:, None] + 2 * x_hat * along_e[:, None]
                grad = tl.where(turns[:, None], ratio[:, None] * turned, grad)
        if of_loss is not None:
            for b in tl.range(0, M):
                rows_b = tl.cast(b, tl.int64) * P + position
                both = fit & _fit(valid, rows_b, there)
                source = rows_b[:, None] * D + columns[None, :]
                e = tl.load(chosen + source, mask=inside, other=0.0)
                weight = tl.load(weights + a * M + b) * times
                pull = tl.where(both[:, None], weight * (x - e), 0.0)
                grad += tl.where(weight == 0, 0.0, pull)  # no NaN of a pair without weight
        tl.store(out + cells, grad.to(out.dtype.element_ty), mask=inside)


def forward(
    rows: Tensor,
    codes: Tensor,
    valid: Tensor | None,
    modalities: int,
    own: float,
    cross: float,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`mmvq_kernels.commitment.forward` on a GPU, for dtypes up to float32."""
    rows, codes = rows.contiguous(), codes.contiguous()
    (N, D), M = rows.shape, modalities
    P = N // M
    quantized, chosen = torch.empty_like(rows), torch.empty_like(rows, dtype=torch.float32)
    loss, weights = chosen.new_empty(1), chosen.new_empty(M, M)
    if N == 0:
        nobody = rows.new_empty(0, dtype=torch.long)
        return quantized, chosen, nobody, loss.zero_().view(()), weights.zero_()
    index, ticket = search_with_ticket(rows, codes)
    indices = torch.empty_like(index)
    block_p, block_d = (8, 128) if P <= 1 << 14 else (32, 64)
    programs = cdiv(P, block_p)
    squares, counts = chosen.new_empty(2, M * M, programs).unbind()
    launching.launch(
        commit_kernel,
        (programs,),
        rows,
        codes,
        launching.as_bytes(valid),
        *(index, quantized, chosen, indices, loss, weights, squares, counts, ticket),
        M,
        P,
        D,
        own,
        cross,
        float(D if mean else 1),
        POINTERS=isinstance(own, Tensor),
        BLOCK_P=block_p,
        BLOCK_D=min(block_d, max(16, triton.next_power_of_2(D))),
        BLOCK=min(1024, triton.next_power_of_2(programs)),
        num_warps=4 if block_p == 8 else 8,
    )
    return quantized, chosen, indices, loss.view(()), weights


def backward(
    rows: Tensor,
    chosen: Tensor,
    valid: Tensor | None,
    weights: Tensor,
    of_codes: Tensor | None,
    of_loss: Tensor | None,
    rotation: bool,
) -> Tensor:
    """`mmvq_kernels.commitment.backward` on a GPU."""
    rows = rows.contiguous()
    (N, D), M = rows.shape, len(weights)
    out = torch.empty_like(rows)
    launching.launch(
        commit_backward_kernel,
        (cdiv(N // M, 8), M),
        rows,
        chosen,
        launching.as_bytes(valid),
        weights,
        None if of_codes is None else of_codes.contiguous(),
        None if of_loss is None else of_loss.view(1),
        out,
        M,
        N // M,
        D,
        ROTATION=rotation,
        BLOCK_P=8,
        BLOCK_D=min(128, max(16, triton.next_power_of_2(D))),
        num_warps=4,
    )
    return out
