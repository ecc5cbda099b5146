"""CLUB, an upper bound of the mutual information (Eq. 4, 5)."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from mmvq.functional.batch import WHOLE, Batch


def gaussian_log_likelihood(
    mu: Tensor,
    logvar: Tensor,
    y: Tensor,
    mask: Tensor | None = None,
    *,
    batch: Batch = WHOLE,
) -> Tensor:
    r"""Mean of $\ln \mathcal N(y; \mu, e^{\mathrm{logvar}})$ over the valid rows, in nats.

    Args:
        mu: means `[..., D]`.
        logvar: log-variances `[..., D]`.
        y: samples `[..., D]`.
        mask: padding mask, bool `[...]`, True = valid.
        batch: result of `mmvq.distributed.gather_batch_sizes`, if the rows are split over ranks:
            the mean is over the rows of all ranks.

    Examples:
        >>> zero = torch.zeros(4, 2)  # the mean of a standard normal: -ln(2 pi) / 2 per dimension
        >>> gaussian_log_likelihood(zero, zero, zero)
        tensor(-1.8379)
    """
    mu, logvar, y = _prepare(mu, logvar, y, mask=mask)
    log_q = -((mu - y).square() * (-logvar).exp() + logvar + math.log(2 * math.pi)).sum(-1) / 2
    return _mean(log_q, mask, batch)


def club(
    mu: Tensor,
    logvar: Tensor,
    y: Tensor,
    mask: Tensor | None = None,
    *,
    batch: Batch = WHOLE,
) -> Tensor:
    r"""VCLUB over all time-aligned pairs of a batch, in closed form (Eq. 5).

    $$\hat I = \frac{1}{BT} \sum_{i,t} \sum_d \frac{
      \frac{1}{B} \sum_j (\mu_{itd} - y_{jtd})^2 - (\mu_{itd} - y_{itd})^2}{2 \sigma^2_{itd}}$$

    As $\frac{1}{B} \sum_j (\mu - y_j)^2 = (\mu - \bar y)^2 + \mathrm{var}\, y$, the batch mean and
    variance of y at each t replace the sum over j. The cost is O(B T D), without a `[B, B, ...]`
    tensor. As in Eq. 5, the negatives include i = j: the value is (1 - 1/B) of that without it.

    Args:
        mu: means of q(y | x) for each x, `[B, T, D]` (or `[B, D]`).
        logvar: log-variances of q(y | x), same shape as mu.
        y: samples, same shape as mu.
        mask: padding mask, bool `[B, T]` (or `[B]`), True = valid as sample and as negative.
        batch: result of `mmvq.distributed.gather_batch_sizes`, if B is split over ranks: mean,
            variance and bound are those of the whole batch.

    Returns:
        Scalar in nats, in at least float32; 0 if nothing is valid.

    Source: Cheng et al. 2020; Eq. 4, 5. The released code draws one random permutation instead of
    all pairs, and averages squared error and log-variance over time separately.

    Examples:
        >>> y = torch.tensor([[1.0], [-1.0]])  # with mu = y the prediction is exact
        >>> club(y, torch.zeros(2, 1), y), club(torch.zeros(2, 1), torch.zeros(2, 1), y)
        (tensor(1.), tensor(0.))
    """
    mu, logvar, y = _prepare(mu, logvar, y, mask=mask)
    weight = torch.ones_like(y[..., :1]) if mask is None else mask[..., None].to(y.dtype)
    total, count = batch.sum((weight * y).sum(0), weight.sum(0))
    count = count.clamp(min=1)  # [T, 1]
    mean = total / count  # [T, D]
    y, mu = y - mean, mu - mean
    (squares,) = batch.sum((weight * y.square()).sum(0))
    variance = squares / count
    excess = variance - y.square() + 2 * mu * y  # mean_j (mu - y_j)^2 - (mu - y)^2
    return _mean((excess * (-logvar).exp()).sum(-1) / 2, mask, batch)


def club_ref(mu: Tensor, logvar: Tensor, y: Tensor) -> Tensor:
    """Slow reference of `club` for `[B, T, D]`: Eq. 5 as loops over i and j.

    Examples:
        >>> mu, logvar, y = torch.randn(3, 4, 2, 5, dtype=torch.float64)
        >>> torch.allclose(club(mu, logvar, y), club_ref(mu, logvar, y))
        True
    """
    B, T, _ = y.shape
    total = y.new_zeros(())
    for i in range(B):
        log_q = [
            -((mu[i] - y[j]).square() / logvar[i].exp() + logvar[i]).sum() / 2 for j in range(B)
        ]
        total = total + log_q[i] / T - torch.stack(log_q).sum() / (B * T)
    return total / B


def club_shuffled(
    mu: Tensor, logvar: Tensor, y: Tensor, permutation: Tensor, mask: Tensor | None = None
) -> Tensor:
    """VCLUB with one negative per sample, `y[permutation]`: noisier than `club`, as unbiased.

    Arguments as in `club`; `permutation` is int64 `[B]`.

    Source: the sampled variant of Cheng et al. 2020, App. A.

    Examples:
        >>> y = torch.tensor([[1.0], [-1.0]])
        >>> club_shuffled(y, torch.zeros(2, 1), y, torch.tensor([1, 0]))
        tensor(2.)
    """
    mu, logvar, y = _prepare(mu, logvar, y, mask=mask)
    negative = y[permutation]
    both = None if mask is None else mask & mask[permutation]
    excess = (mu - negative).square() - (mu - y).square()
    return _mean((excess * (-logvar).exp()).sum(-1) / 2, both)


def club_penalty(
    mu: Tensor,
    y: Tensor,
    mask: Tensor | None = None,
    *,
    batch: Batch = WHOLE,
) -> Tensor:
    r"""Share of the variance of y that mu explains, once mu is refitted to the batch.

    $$\frac{1}{D} \sum_d \rho_d^2, \qquad
      \rho_d^2 = \frac{\big[\sum_{i,t} (\mu_{itd} - \bar\mu_{td}) (y_{itd} - \bar y_{td})\big]^2}
      {\sum_{i,t} (\mu_{itd} - \bar\mu_{td})^2 \, \sum_{i,t} (y_{itd} - \bar y_{td})^2}$$

    The means are over the clips at each t, because the negatives of Eq. 5 are time-aligned. If each
    dimension of mu is replaced by its least-squares fit to y, with one scale, an offset for each t,
    and the variance of the residuals as $\sigma_d^2$, then `club` is
    $\sum_d \rho_d^2 / (1 - \rho_d^2)$. It grows with the same $\rho_d^2$, which is the
    coefficient of determination of that fit.

    Eq. 5 of a fixed q has no minimum: it pulls y by $(\bar\mu_d - \mu_{itd}) / \sigma_d^2$
    wherever y is. $\rho_d^2$ is least, and its gradient vanishes, where mu and y are uncorrelated.
    It depends on the scale and offset of neither.

    Args:
        mu: means of q(y | x) for each x, `[B, T, D]` (or `[B, D]`).
        y: samples, same shape as mu.
        mask: padding mask, bool `[B, T]` (or `[B]`), True = valid.
        batch: result of `mmvq.distributed.gather_batch_sizes`, if B is split over ranks: the
            correlations are those of the whole batch.

    Returns:
        Scalar without unit in [0, 1], in at least float32. A dimension in which mu or y is
        constant, up to rounding error, counts as 0. Independent rows have about 1 / (T (B - 1)).

    Source: not in the paper, which minimises Eq. 5 itself.

    Examples:
        >>> mu, other = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), torch.tensor([1.0, 1, -1, -1])
        >>> club_penalty(mu, 3 - 2 * mu), club_penalty(mu, other[:, None])
        (tensor(1.), tensor(0.))
    """
    v = torch.stack(_prepare(mu, y, mask=mask))
    weight = torch.ones_like(v[0, ..., :1]) if mask is None else mask[..., None].to(v.dtype)
    squares = v.square().flatten(1, -2).sum(1)
    total, count, squares = batch.sum(v.sum(1), weight.sum(0), squares)  # [2, T, D], [T, 1], [2, D]
    v = (weight * (v - (total / count.clamp(min=1))[:, None])).flatten(1, -2)
    # at a scale of 1, which changes no penalty, no ratio of variances overflows
    v = v / squares.detach().sqrt().clamp(min=torch.finfo(v.dtype).tiny)[:, None]
    variance, covariance = batch.sum(v.square().sum(1), (v[0] * v[1]).sum(0))
    rounding = (64 * torch.finfo(v.dtype).eps) ** 2
    slope = covariance / variance.where(variance > rounding, torch.inf)  # y on mu, and mu on y
    return (slope[0] * slope[1]).mean()


def club_penalty_ref(mu: Tensor, y: Tensor) -> Tensor:
    """Slow reference of `club_penalty` for `[B, T, D]`: a least-squares fit of each dimension of y.

    Examples:
        >>> mu, y = torch.randn(2, 4, 2, 5, dtype=torch.float64)
        >>> torch.allclose(club_penalty(mu, y), club_penalty_ref(mu, y))
        True
    """
    B, T, D = y.shape
    offsets = torch.eye(T, dtype=y.dtype, device=y.device).repeat(B, 1)  # [B T, T]

    def residual(target: Tensor, *inputs: Tensor) -> Tensor:
        A = torch.stack([*inputs, *offsets.unbind(1)], 1)
        fit: Tensor = A @ torch.linalg.lstsq(A, target[:, None]).solution
        return (target - fit[:, 0]).square().sum()

    mu, y = mu.reshape(-1, D), y.reshape(-1, D)
    shares = [1 - residual(y[:, d], mu[:, d]) / residual(y[:, d]) for d in range(D)]
    return torch.stack(shares).mean()


def _prepare(*tensors: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Cast to at least float32, and set masked rows to 0, so that no gradient is NaN there."""
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)
    wide = [x.to(dtype) for x in tensors]
    return wide if mask is None else [torch.where(mask[..., None], x, 0) for x in wide]


def _mean(values: Tensor, mask: Tensor | None, batch: Batch = WHOLE) -> Tensor:
    if mask is not None:
        values = torch.where(mask, values, 0)
    count = values.new_full((), values.numel(), dtype=torch.long) if mask is None else mask.sum()
    total, count = batch.sum(values.sum(), count)
    return total / count.clamp(min=1)
