"""Gradients through the choice of a code."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmvq_kernels.checks import is_cpu_readable


def straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """Return the codes in the forward pass, and pass the gradient to z in the backward pass.

    The output is exactly `codes` where z is finite, and NaN otherwise; `d out / d z = 1`.

    Source: Bengio et al. 2013; van den Oord et al. 2017.

    Examples:
        >>> z = torch.zeros(2, requires_grad=True)
        >>> q = straight_through(z, torch.tensor([1.0, 2.0]))
        >>> q.detach(), torch.autograd.grad(q.sum(), z)
        (tensor([1., 2.]), (tensor([1., 1.]),))
    """
    alike = z.shape == codes.shape and z.dtype == codes.dtype
    if alike and is_cpu_readable(z) and forward_ad._current_level < 0:
        if math.isfinite(z.detach().sum(dtype=torch.float32).numpy()):
            apply: Any = _Pass.apply  # untyped in torch
            passed: Tensor = apply(z, codes.detach())  # half of the passes over memory
            return passed
    return codes.detach() + (z - z.detach())


class _Pass(torch.autograd.Function):
    """The codes; their gradient is that of z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, codes: Tensor) -> Tensor:
        return codes.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def rotate(z: Tensor, codes: Tensor) -> Tensor:
    r"""Return the codes in the forward pass; rotate and rescale the gradient in the backward pass.

    $$\tilde q = \frac{\lVert e \rVert}{\lVert z \rVert}
      \left(I - 2 u u^\top + 2 \hat e \hat z^\top\right) z,
      \qquad u = \frac{\hat e + \hat z}{\lVert \hat e + \hat z \rVert}$$

    Everything but the last z is held constant, so that the gradient has the same angle to z as to
    e. If z or e is zero, if they are opposite, or if the ratio of their norms overflows, this is
    `straight_through`.

    Args:
        z: vectors `[..., D]`.
        codes: chosen codes `[..., D]`.

    Source: Fifty et al. 2024, "Restructuring Vector Quantization with the Rotation Trick". Not in
    the paper.

    Examples:
        >>> z = torch.tensor([1.0, 0.0], requires_grad=True)
        >>> q = rotate(z, torch.tensor([0.0, 2.0]))  # a quarter turn, and twice as long
        >>> torch.allclose(torch.autograd.grad(q[1], z)[0], torch.tensor([2.0, 0.0]), atol=1e-6)
        True
    """
    codes = codes.detach()
    dtype = torch.promote_types(torch.promote_types(z.dtype, codes.dtype), torch.float32)
    x, e = z.to(dtype), codes.to(dtype)  # a norm may exceed float16
    with torch.no_grad():
        x_norm, e_norm = x.norm(dim=-1, keepdim=True), e.norm(dim=-1, keepdim=True)
        tiny = torch.finfo(dtype).tiny
        x_hat, e_hat = x / x_norm.clamp(min=tiny), e / e_norm.clamp(min=tiny)
        u = x_hat + e_hat
        u_norm = u.norm(dim=-1, keepdim=True)
        u = u / u_norm.clamp(min=tiny)
        scale = e_norm / x_norm
        degenerate = (x_norm <= tiny) | (e_norm <= tiny) | (u_norm <= 1e-3) | ~scale.isfinite()
        scale = torch.where(degenerate, 1, scale)  # infinity would make the gradient NaN
    turned = (
        x - 2 * u * (u * x).sum(-1, keepdim=True) + 2 * e_hat * (x_hat * x).sum(-1, keepdim=True)
    )
    backward = torch.where(degenerate, x, scale * turned)
    return codes + (backward - backward.detach()).to(z.dtype)
