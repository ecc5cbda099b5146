"""Nearest codes, their commitment loss (Eq. 8) and gradient estimator, as one operation.

For a GPU, where many small launches take longer than their work. The Triton kernels are in
`mmvq_kernels/gpu/commitment.py`, which only a GPU imports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmvq_kernels.nearest import search
from mmvq_kernels.operators import register, variable


def quantize(
    features: Sequence[Tensor],
    rows: Tensor,
    codes: Tensor,
    valid: Tensor | None,
    own: float,
    cross: float,
    mean: bool,
    rotation: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Quantize the vectors of M modalities with P positions each.

    Args:
        features: features of each modality, `[B, T, D]`, which get the gradient.
        rows: the same as `[M P, D]`; masked ones may hold anything.
        codes: codes `[L, D]`, which get no gradient.
        valid: bool `[M P]`, or None.
        own: weight of the own codes of a modality in the loss (beta of Eq. 8).
        cross: weight of the mean over the codes of the others (beta rho).
        mean: whether a squared norm is averaged over D.
        rotation: whether the gradient of `quantized` is rotated (Fifty et al. 2024), or passed as
            it is.

    Returns:
        The codes of each modality, shaped as its features, in the dtype of the rows, 0 where
        masked, NaN where the vector is not finite; indices, int64 `[M P]`, -1 where masked; the
        loss.
    """
    apply: Any = _Quantize.apply  # untyped in torch
    weights: tuple[Any, Any] = own, cross
    if torch.compiler.is_compiling():  # dynamo takes a float in a Function for a constant
        weights = variable(rows, own), variable(rows, cross)
    arguments = rows.detach(), codes, valid, *weights, mean, rotation
    *quantized, indices, loss = apply(*arguments, *features)
    parts = zip(quantized, features, strict=True)
    return [q if x.requires_grad else q.detach() for q, x in parts], indices, loss


class _Quantize(torch.autograd.Function):
    """Autograd over the two operators; with `create_graph`, over the torch path of the second."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        codes: Tensor,
        valid: Tensor | None,
        own: float,
        cross: float,
        mean: bool,
        rotation: bool,
        *features: Tensor,
    ) -> tuple[Tensor, ...]:
        arguments = rows, codes, valid, len(features), own, cross, mean
        flat, chosen, indices, loss, weights = forward(*arguments)
        ctx.save_for_backward(rows, chosen, valid, weights, *features)
        ctx.rotation = rotation
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        # Tensors of their own on one memory: a view of several may not be changed in place.
        parts = zip(flat.chunk(len(features)), features, strict=True)
        return *(part.view(x.shape).data for part, x in parts), indices, loss.data

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *of_parts, _, of_loss = grads
        rows, chosen, valid, weights, *features = ctx.saved_tensors
        used = [of_loss is not None or part is not None for part in of_parts]
        of_codes = None
        if any(part is not None for part in of_parts):
            pairs = zip(of_parts, features, strict=True)
            whole = [torch.zeros_like(x) if g is None else g for g, x in pairs]
            of_codes = torch.cat([g.reshape(-1, g.shape[-1]) for g in whole])
        run = backward
        if torch.is_grad_enabled():
            run, rows = backward_torch, torch.cat([x.flatten(0, 1) for x in features])
        found: Sequence[Tensor | None] = [None] * len(features)
        if any(used):
            grad = run(rows, chosen, valid, weights, of_codes, of_loss, ctx.rotation)
            parts = zip(used, grad.chunk(len(features)), features, strict=True)
            found = [g.view(x.shape).to(x.dtype) if of else None for of, g, x in parts]
        return *(None,) * 7, *found


def forward_torch(
    rows: Tensor,
    codes: Tensor,
    valid: Tensor | None,
    modalities: int,
    own: float,
    cross: float,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantized vectors, codes in float32, indices, loss, and the weights `[M, M]` of its terms.

    The weight of a pair (a, b) multiplies the sum of |z_a - e_b|^2 over their valid positions.
    """
    M, D = modalities, rows.shape[1]
    index = search(rows, codes, False)
    chosen = codes.index_select(0, index).float()
    quantized = (chosen + (rows - rows)).to(rows.dtype)  # NaN where a vector is not finite
    fit = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
    z, e, some = rows.float().view(M, -1, D), chosen.view(M, -1, D), fit.view(M, -1)
    both = some[:, None] & some  # [M, M, P]
    counts = both.sum(-1)
    diagonal = torch.eye(M, dtype=torch.bool, device=rows.device)
    others = ((counts > 0) & ~diagonal).sum(1, keepdim=True).clamp(min=1)
    weights = torch.where(diagonal, own, cross / others).to(z.dtype)
    weights = weights / (counts * (D if mean else 1)).clamp(min=1)
    squares = torch.where(both[..., None], z[:, None] - e, 0).square().sum((-1, -2))
    squares = torch.where((weights == 0) & ~diagonal, 0, squares)
    quantized = torch.where(fit[:, None], quantized, 0)
    return quantized, chosen, torch.where(fit, index, -1), (weights * squares).sum(), weights


def backward_torch(
    rows: Tensor,
    chosen: Tensor,
    valid: Tensor | None,
    weights: Tensor,
    of_codes: Tensor | None,
    of_loss: Tensor | None,
    rotation: bool,
) -> Tensor:
    """The gradient of the rows, from that of `quantized` and of the loss."""
    M = len(weights)
    fit = torch.ones_like(rows[:, 0], dtype=torch.bool) if valid is None else valid
    grad = torch.zeros_like(chosen)
    if of_codes is not None:
        grad = torch.where(fit[:, None], of_codes, 0).to(chosen.dtype)
        if rotation:
            grad = _rotate_back(rows.detach().float(), chosen, grad)
    if of_loss is not None:
        z, e, some = (x.view(M, -1, *x.shape[1:]) for x in (rows.to(chosen.dtype), chosen, fit))
        adds = (weights != 0) | torch.eye(M, dtype=torch.bool, device=rows.device)
        both = adds[..., None] & some[:, None] & some  # [M, M, P]
        off = torch.where(both[..., None], z[:, None] - e, 0)
        grad = grad + 2 * of_loss * (weights[..., None, None] * off).sum(1).view_as(grad)
    return grad.to(rows.dtype)


def _rotate_back(x: Tensor, e: Tensor, grad: Tensor) -> Tensor:
    """The transpose of the rotation and scaling of `mmvq.functional.rotate`, times `grad`."""
    tiny = torch.finfo(x.dtype).tiny
    x_norm, e_norm = x.norm(dim=-1, keepdim=True), e.norm(dim=-1, keepdim=True)
    x_hat, e_hat = x / x_norm.clamp(min=tiny), e / e_norm.clamp(min=tiny)
    u = x_hat + e_hat
    u_norm = u.norm(dim=-1, keepdim=True)
    u = u / u_norm.clamp(min=tiny)
    scale = e_norm / x_norm
    degenerate = (x_norm <= tiny) | (e_norm <= tiny) | (u_norm <= 1e-3) | ~scale.isfinite()
    turned = grad - 2 * u * (u * grad).sum(-1, keepdim=True)
    turned = turned + 2 * x_hat * (e_hat * grad).sum(-1, keepdim=True)
    return torch.where(degenerate, grad, scale.masked_fill(degenerate, 1) * turned)


forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = register(
    "mmvq::quantize",
    forward_torch,
    gpu="mmvq_kernels.gpu.commitment:forward",
    inline=True,
    fake=lambda rows, _codes, _valid, M, *_: (
        torch.empty_like(rows, memory_format=torch.contiguous_format),
        rows.new_empty(rows.shape, dtype=torch.float32),
        rows.new_empty(rows.shape[0], dtype=torch.long),
        rows.new_empty((), dtype=torch.float32),
        rows.new_empty(M, M, dtype=torch.float32),
    ),
)
backward: Callable[..., Tensor] = register(
    "mmvq::quantize_backward",
    backward_torch,
    gpu="mmvq_kernels.gpu.commitment:backward",
    inline=True,
    fake=lambda rows, *_: torch.empty_like(rows, memory_format=torch.contiguous_format),
)
