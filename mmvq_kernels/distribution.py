"""The distribution of a clip over the codes, which L_cmcm compares.

The Triton kernels are in `mmvq_kernels/gpu/distribution.py`, which only a GPU imports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from mmvq_kernels.backends import Backend, require, transformed
from mmvq_kernels.checks import is_cpu_readable
from mmvq_kernels.messages import message
from mmvq_kernels.operators import register, through_operator
from mmvq_kernels.products import matmul_t

_BLOCK_BYTES = 1 << 23  # of distances at a time, of at least one clip


def code_log_probabilities_ref(x: Tensor, codebook: Tensor) -> Tensor:
    """`ln mean_t softmax_l(-|x_t - e_l|)` in float64, every difference written out."""
    distance: Tensor = (x.double()[:, :, None] - codebook.double()).norm(dim=-1)  # [B, T, L]
    return (-distance).log_softmax(-1).logsumexp(1) - math.log(x.shape[1])


def code_log_probabilities(
    x: Tensor, codebook: Tensor, mask: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    r"""Log-probability of each code for each clip, always finite.

    $$\ln P(l) = \ln \frac{1}{T} \sum_t \mathrm{softmax}_l(-\lVert x_t - e_l \rVert_2)$$

    Differentiable (once) in x and the codebook. A distance that is smaller than its rounding error
    counts as 0 and has gradient 0 (in float32 with D 256: one below 0.4% of the distance of x from
    the middle of the codes). At most the distances of some clips are in memory at a time.

    Args:
        x: features of B clips, `[B, T, D]`, any float dtype.
        codebook: codes, `[L, D]`.
        mask: bool `[B, T]`, True = valid; the mean is over valid segments, and the others are not
            read. A clip without a valid segment (or T = 0) counts as one segment of zeros.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        `[B, L]`, in at least float32.

    Raises:
        ValueError: shapes that do not fit, an empty codebook, a mask that is not bool.
        TypeError: x or codebook is not floating point.
        RuntimeError: the backend cannot run here.

    Examples:
        >>> codebook = torch.tensor([[0.0], [2.0]])
        >>> code_log_probabilities(torch.ones(1, 5, 1), codebook).exp()  # halfway between
        tensor([[0.5000, 0.5000]])
    """
    where = "code_log_probabilities"
    if x.ndim != 3 or codebook.ndim != 2 or x.shape[2] != codebook.shape[1]:
        rule = "x [B, T, D] and codebook [L, D] must share their last dimension"
        hint = "give every clip a time axis and project it to the codebook's width"
        raise ValueError(message(where, rule, hint=hint, x=x, codebook=codebook))
    if not (x.is_floating_point() and codebook.is_floating_point()):
        rule, hint = "x and codebook must be floating point", "convert with .float()"
        raise TypeError(message(where, rule, hint=hint, x=x, codebook=codebook))
    if codebook.numel() == 0:
        hint = "build the codebook with at least one code of at least one dimension"
        raise ValueError(message(where, "codebook must not be empty", hint=hint, codebook=codebook))
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
        hint = "give every segment one entry, True where it is valid"
        raise ValueError(message(where, "mask must be bool [B, T]", hint=hint, x=x, mask=mask))
    require(where, backend, x, codebook, mask)
    return log_probabilities(x, codebook, mask, backend)


def log_probabilities(
    x: Tensor, codebook: Tensor, mask: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """`code_log_probabilities` without the checks."""
    if x.shape[1] == 0:  # one segment of padding
        x, mask = pad(x, (0, 0, 0, 1)), None
    as_operator = backend != "torch" and through_operator(x) and not transformed()
    run: Any = forward if as_operator else _LogProbabilities.apply
    log_p: Tensor = run(x, codebook, mask)[0]
    return log_p


class _LogProbabilities(torch.autograd.Function):
    """The torch path, a few clips at a time; backward computes their distances again.

    Inside `torch.vmap` it calls the operators, which have a rule for it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, codebook: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return (forward if transformed() else forward_torch)(x, codebook, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # the normalizers would get zeros

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, _: None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        return _differentiate(backward if transformed() else backward_torch, ctx, grad)


def _differentiate(
    run: Any, ctx: Any, grad: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None]:
    if grad is None:  # nothing depends on the result
        return None, None, None
    of_codes: bool = ctx.needs_input_grad[1]
    of_x, of_codebook = run(grad, *ctx.saved_tensors, of_codes)
    return of_x, of_codebook if of_codes else None, None


def cancellation_threshold(dtype: torch.dtype, D: int) -> float:
    """Below this share of `|x|^2`, `|x|^2 - 2 x.e + |e|^2` is rounding error, and no distance.

    The rounding error of a sum of D terms grows with the root of D. With `x = e`, eight times that
    is more than any draw left, in float32 as in tf32x3.
    """
    return 8 * torch.finfo(dtype).eps * math.sqrt(D)


def forward_torch(x: Tensor, codebook: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`ln P`, and the normalizers that the backward of the Triton kernels needs: here zeros."""
    x, codes = _centre(x, codebook, mask)
    log_used, log_n = _log_used(mask, x)
    log_p, norms = x.new_empty(x.shape[0], codes.shape[0]), codes.square().sum(-1)
    for clips in _blocks(x, codes):
        distance, _ = _distances(x[clips], codes, norms)  # [b, T, L]
        log_p_t = distance.neg_().log_softmax(-1)
        if log_used is not None:
            log_p_t.add_(log_used[clips])
        log_p[clips] = log_p_t.logsumexp(1)
    return log_p.sub_(log_n), x.new_zeros(x.shape[:2], dtype=torch.float32)


def _centre(x: Tensor, codebook: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Vectors, 0 where they are not valid, and codes, minus the mean code."""
    dtype = _wider(x, codebook)
    mean = codebook.detach().mean(0).to(dtype)
    if mask is not None:
        x = torch.where(mask[..., None], x, 0)
    return x.to(dtype) - mean, codebook.to(dtype) - mean


def _wider(x: Tensor, codebook: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)


def _log_used(mask: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor | float]:
    """Logarithms of whether a segment counts, `[B, T, 1]`, and of how many do, `[B, 1]`.

    Without a mask all count, and without a valid segment all of the clip do.
    """
    if mask is None:
        return None, math.log(x.shape[1])
    used = (mask | ~mask.any(1, keepdim=True))[..., None]
    return torch.where(used, 0.0, -torch.inf).to(x), used.sum(1).to(x).log()


def _distances(x: Tensor, codes: Tensor, norms: Tensor) -> tuple[Tensor, Tensor | None]:
    """`|x - e|`, `[B, T, L]`, and where it is below its rounding error and set to 0, if anywhere.

    `norms` are |e|^2.
    """
    own = x.square().sum(-1, keepdim=True)
    squares = _product(x, codes).mul_(-2).add_(own).add_(norms)
    floor = cancellation_threshold(x.dtype, x.shape[-1]) * own
    if is_cpu_readable(squares) and not (squares.amin(-1, keepdim=True) <= floor).numpy().any():
        return squares.sqrt_(), None  # the usual case: two passes less
    lost = squares <= floor
    return squares.masked_fill_(lost, 0).sqrt_(), lost


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T`, at full precision under autocast too."""
    with torch.autocast(a.device.type, enabled=False):
        return matmul_t(a, b)


def _blocks(x: Tensor, codes: Tensor) -> Iterator[slice]:
    room = _BLOCK_BYTES * (1 if x.device.type == "cpu" else 32)
    clips = max(1, room // max(1, x.shape[1] * codes.shape[0] * x.element_size()))
    for start in range(0, x.shape[0], clips):
        yield slice(start, start + clips)


def backward_torch(
    grad: Tensor,
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    log_p: Tensor,
    normalizers: Tensor,
    of_codes: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and, if `of_codes`, of the codebook."""
    x_dtype, (x, codes) = x.dtype, _centre(x, codebook, mask)
    (log_used, log_n), norms = _log_used(mask, x), codes.square().sum(-1)
    shift = (log_p + log_n)[:, None]  # [B, 1, L]
    of_x = x.new_empty(x.shape)
    of_codebook = codes.new_zeros(codes.shape if of_codes else 0)
    for clips in _blocks(x, codes):
        distance, lost = _distances(x[clips], codes, norms)
        log_p_t = (-distance).log_softmax(-1)  # [b, T, L]
        if log_used is not None:
            log_p_t.add_(log_used[clips])
        pull = (log_p_t - shift[clips]).exp_().mul_(grad[clips, None])
        q = log_p_t.exp_().mul_(pull.sum(-1, keepdim=True)).sub_(pull).div_(distance)
        if lost is not None:
            q = q.masked_fill_(lost, 0)
        of_x[clips] = x[clips] * q.sum(-1, keepdim=True) - _product(q, codes.T)
        if of_codes:
            q, rows = q.flatten(0, 1), x[clips].flatten(0, 1)
            of_codebook.addcmul_(codes, q.sum(0)[:, None]).sub_(_product(q.T, rows.T))
    if mask is not None:
        of_x.masked_fill_(~mask[..., None], 0)
    return of_x.to(x_dtype), of_codebook.to(codebook.dtype)


forward: Callable[..., tuple[Tensor, Tensor]] = register(
    "mmvq::code_log_probabilities",
    forward_torch,
    gpu="mmvq_kernels.gpu.distribution:forward",
    fake=lambda x, codebook, _mask: (
        x.new_empty(x.shape[0], codebook.shape[0], dtype=_wider(x, codebook)),
        x.new_empty(x.shape[:2], dtype=torch.float32),
    ),
)
backward: Callable[..., tuple[Tensor, Tensor]] = register(
    "mmvq::code_log_probabilities_backward",
    backward_torch,
    gpu="mmvq_kernels.gpu.distribution:backward",
    fake=lambda _grad, x, codebook, _mask, _log_p, _normalizers, of_codes: (
        x.new_empty(x.shape),
        codebook.new_empty(codebook.shape if of_codes else 0),
    ),
)
torch.library.register_autograd(
    "mmvq::code_log_probabilities",
    lambda ctx, grad, _: _differentiate(torch.ops.mmvq.code_log_probabilities_backward, ctx, grad),
    setup_context=_LogProbabilities.setup_context,
)
