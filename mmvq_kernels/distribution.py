"""How likely a clip is to use each code, the distribution under L_cmcm.

The Triton kernels are in `mmvq_kernels/gpu/distribution.py`, which only a GPU imports.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from mmvq_kernels.backends import (
    Backend,
    register_sequential_vmap,
    require,
    runs_triton,
    through_operator,
    transformed,
)
from mmvq_kernels.checks import is_cpu_readable
from mmvq_kernels.messages import message
from mmvq_kernels.products import matmul_t
from mmvq_kernels.rounding import cancellation_threshold

_BLOCK_BYTES = 1 << 23  # of distances held at a time, of one clip at least


def code_log_probabilities_ref(x: Tensor, codebook: Tensor) -> Tensor:
    """`ln mean_t softmax_l(-|x_t - e_l|)` in float64, every difference written out."""
    distance: Tensor = (x.double()[:, :, None] - codebook.double()).norm(dim=-1)  # [B, T, L]
    return (-distance).log_softmax(-1).logsumexp(1) - math.log(x.shape[1])


def code_log_probabilities(
    x: Tensor, codebook: Tensor, mask: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    r"""The logarithm of how likely a clip is to use each code, finite everywhere.

    $$\ln P(l) = \ln \frac{1}{T} \sum_t \mathrm{softmax}_l(-\lVert x_t - e_l \rVert_2)$$

    Differentiable (once) in x and the codebook. Where x is so near a code that rounding hides the
    distance (in float32 and D 256, within 0.4% of |x| about the mean code), it counts as 0, and
    its gradient is 0. No `[B, T, L]` tensor is made, neither forward nor backward.

    Args:
        x: features of B clips, `[B, T, D]`, any float dtype.
        codebook: codes, `[L, D]`.
        mask: bool `[B, T]`, True = valid; the mean is over valid segments, and what lies under a
            False is not read. A clip without a valid segment (T = 0, too) is one of zeros.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        `[B, L]`, in at least float32.

    Raises:
        ValueError: shapes that do not fit, an empty codebook, a mask that is not bool.
        RuntimeError: the backend cannot run here.

    Examples:
        >>> codebook = torch.tensor([[0.0], [2.0]])
        >>> code_log_probabilities(torch.ones(1, 5, 1), codebook).exp()  # half way between
        tensor([[0.5000, 0.5000]])
    """
    _check(x, codebook, mask)
    require("code_log_probabilities", backend, x, codebook, mask)
    if mask is None:
        valid = x.new_ones(x.shape[:2], dtype=torch.bool)
    else:
        valid, x = mask, torch.where(mask[..., None], x, 0)
    if x.shape[1] == 0:  # one segment of padding
        x, valid = pad(x, (0, 0, 0, 1)), pad(valid, (0, 1))
    used = valid | ~valid.any(1, keepdim=True)
    if transformed() or not through_operator(backend, x):
        run: Any = _LogProbabilities.apply
    else:
        run = _code_log_probabilities
    log_p: Tensor = run(x, codebook, used)[0]
    return log_p


class _LogProbabilities(torch.autograd.Function):
    """The torch path, a few clips at a time; backward computes their distances anew.

    Inside `torch.vmap` it calls the operators, which know how to go through a batch of tensors.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, codebook: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
        return (_code_log_probabilities if transformed() else _forward_torch)(x, codebook, used)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None]:
        of_codes: bool = ctx.needs_input_grad[1]
        run: Any = _backward if transformed() else _backward_torch
        of_x, of_codebook = run(grad, *ctx.saved_tensors, of_codes)
        return of_x, of_codebook if of_codes else None, None


def _forward_torch(x: Tensor, codebook: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """`ln P`, and the normalizers that the Triton kernel gives to its backward: here, zeros."""
    log_p = _log_probabilities_torch(x, codebook, used)
    return log_p, x.new_zeros(x.shape[:2], dtype=torch.float32)


def _log_probabilities_torch(x: Tensor, codebook: Tensor, used: Tensor) -> Tensor:
    x, codes = _centre(x, codebook)
    log_used = _log_used(used, x.dtype)
    log_p, norms = x.new_empty(x.shape[0], codes.shape[0]), codes.square().sum(-1)
    for clips in _blocks(x, codes):
        distance, _ = _distances(x[clips], codes, norms)  # [b, T, L]
        log_p_t = distance.neg_().log_softmax(-1).add_(log_used[clips])
        log_p[clips] = log_p_t.logsumexp(1)
    return log_p.sub_(log_used.logsumexp(1))


def _centre(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    mean = codebook.detach().mean(0).to(dtype)
    return x.to(dtype) - mean, codebook.to(dtype) - mean


def _log_used(used: Tensor, dtype: torch.dtype) -> Tensor:
    """The logarithm of what a segment counts, 1 or 0, `[B, T, 1]`."""
    return torch.where(used[..., None], 0.0, -torch.inf).to(dtype)


def _distances(x: Tensor, codes: Tensor, norms: Tensor) -> tuple[Tensor, Tensor | None]:
    """`|x - e|`, `[B, T, L]`, and where it is lost to rounding and 0, if so anywhere.

    `norms` are |e|^2.
    """
    own = x.square().sum(-1, keepdim=True)
    squares = _product(x, codes).mul_(-2).add_(own).add_(norms)
    floor = cancellation_threshold(x.dtype, x.shape[-1]) * own
    if is_cpu_readable(squares) and not (squares.amin(-1, keepdim=True) <= floor).numpy().any():
        return squares.sqrt_(), None  # as a rule: two passes less
    lost = squares <= floor
    return squares.masked_fill_(lost, 0).sqrt_(), lost


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T`, as exact under autocast as elsewhere."""
    with torch.autocast(a.device.type, enabled=False):
        return matmul_t(a, b)


def _blocks(x: Tensor, codes: Tensor) -> Iterator[slice]:
    room = _BLOCK_BYTES * (1 if x.device.type == "cpu" else 32)
    clips = max(1, room // max(1, x.shape[1] * codes.shape[0] * x.element_size()))
    for start in range(0, x.shape[0], clips):
        yield slice(start, start + clips)


@torch.library.custom_op("mmvq::code_log_probabilities", mutates_args=())
def _code_log_probabilities(x: Tensor, codebook: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    return _forward_torch(x, codebook, used)


@_code_log_probabilities.register_kernel("cuda")
def _(x: Tensor, codebook: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    if not runs_triton(x, codebook, used):
        return _forward_torch(x, codebook, used)
    from mmvq_kernels.gpu.distribution import forward

    return forward(x, codebook, used)


@_code_log_probabilities.register_fake
def _(x: Tensor, codebook: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    log_p = x.new_empty((x.shape[0], codebook.shape[0]), dtype=dtype)
    return log_p, x.new_empty(x.shape[:2], dtype=torch.float32)


register_sequential_vmap(_code_log_probabilities)


@torch.library.custom_op("mmvq::code_log_probabilities_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    codebook: Tensor,
    used: Tensor,
    log_p: Tensor,
    normalizers: Tensor,
    of_codes: bool,
) -> tuple[Tensor, Tensor]:
    return _backward_torch(grad, x, codebook, used, log_p, normalizers, of_codes)


@_backward.register_kernel("cuda")
def _(
    grad: Tensor,
    x: Tensor,
    codebook: Tensor,
    used: Tensor,
    log_p: Tensor,
    normalizers: Tensor,
    of_codes: bool,
) -> tuple[Tensor, Tensor]:
    if not runs_triton(x, codebook, used):
        return _backward_torch(grad, x, codebook, used, log_p, normalizers, of_codes)
    from mmvq_kernels.gpu.distribution import backward

    of_x, of_codebook = backward(grad, x, codebook, used, log_p, normalizers, of_codes)
    return of_x.to(x.dtype), of_codebook.to(codebook.dtype)


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    codebook: Tensor,
    used: Tensor,
    log_p: Tensor,
    normalizers: Tensor,
    of_codes: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), codebook.new_empty(codebook.shape if of_codes else 0)


register_sequential_vmap(_backward)


def _backward_torch(
    grad: Tensor,
    x: Tensor,
    codebook: Tensor,
    used: Tensor,
    log_p: Tensor,
    normalizers: Tensor,
    of_codes: bool,
) -> tuple[Tensor, Tensor]:
    x_dtype, (x, codes) = x.dtype, _centre(x, codebook)
    log_used, norms = _log_used(used, x.dtype), codes.square().sum(-1)
    shift = log_used.logsumexp(1, keepdim=True) + log_p[:, None]  # [B, 1, L]
    of_x = x.new_empty(x.shape)
    of_codebook = codes.new_zeros(codes.shape if of_codes else 0)
    for clips in _blocks(x, codes):
        distance, lost = _distances(x[clips], codes, norms)
        log_p_t = (-distance).log_softmax(-1).add_(log_used[clips])  # [b, T, L]
        pull = (log_p_t - shift[clips]).exp_().mul_(grad[clips, None])
        q = log_p_t.exp_().mul_(pull.sum(-1, keepdim=True)).sub_(pull).div_(distance)
        if lost is not None:
            q = q.masked_fill_(lost, 0)
        of_x[clips] = x[clips] * q.sum(-1, keepdim=True) - _product(q, codes.T)
        if of_codes:
            q, rows = q.flatten(0, 1), x[clips].flatten(0, 1)
            of_codebook.addcmul_(codes, q.sum(0)[:, None]).sub_(_product(q.T, rows.T))
    return of_x.to(x_dtype), of_codebook.to(codebook.dtype)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None]:
    of_codes: bool = ctx.needs_input_grad[1]
    of_x, of_codebook = _backward(grad, *ctx.saved_tensors, of_codes)
    return of_x, of_codebook if of_codes else None, None


_setup = _LogProbabilities.setup_context
_code_log_probabilities.register_autograd(_differentiate, setup_context=_setup)


def _check(x: Tensor, codebook: Tensor, mask: Tensor | None) -> None:
    if x.ndim != 3 or codebook.ndim != 2 or x.shape[2] != codebook.shape[1]:
        raise ValueError(
            message(
                "code_log_probabilities",
                "x [B, T, D] and codebook [L, D] must share their last dimension",
                hint="give every clip a time axis and project it to the codebook's width",
                x=x,
                codebook=codebook,
            )
        )
    if codebook.numel() == 0:
        raise ValueError(
            message(
                "code_log_probabilities",
                "codebook must not be empty",
                hint="build the codebook with size >= 1 and dim >= 1",
                codebook=codebook,
            )
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
        raise ValueError(
            message(
                "code_log_probabilities",
                "mask must be bool [B, T]",
                hint="give every segment one entry, True where it is valid",
                x=x,
                mask=mask,
            )
        )
