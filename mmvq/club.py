"""CLUB: an upper bound of mutual information, and the penalty that encoders minimise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmvq import functional
from mmvq.checks import (
    check_choice,
    check_finite,
    check_floating,
    check_int,
    check_mask,
    check_positive,
    message,
)
from mmvq.distributed import OverRanks, gather_batch_sizes
from mmvq.pretrained import Pretrained


class CLUBEstimator(OverRanks, Pretrained):
    r"""VCLUB: an upper bound of the mutual information I(x; y), estimated by a learned q(y | x).

    $$\hat I = \frac{1}{B} \sum_i \Big[ \frac{1}{T} \sum_t \ln q(y_{it} | x_{it})
      - \frac{1}{B T} \sum_j \sum_t \ln q(y_{jt} | x_{it}) \Big],
      \qquad q(y | x) = \mathcal N(\mu(x), \mathrm{diag}\, \sigma^2(x))$$

    The direction matters: q predicts y from x. In the paper x is the semantic and y the
    modality-specific feature. Alternate between a step on `learning_loss`, with an optimiser of
    this module's parameters, and a step of the encoders on `penalty`. `forward` measures: encoders
    that minimise it beside other losses are driven past independence (see `penalty`).

    Args:
        x_dim: dimension of x.
        y_dim: dimension of y.
        hidden_dim: hidden dimension of the two networks, each Linear-ReLU-Linear.
        negatives: `"all"` uses every pair of the batch at the same t, in closed form in O(B T D);
            `"shuffled"` uses one random permutation of the batch.
        logvar_bound: bound b > 0 of the log-variance, which is `b tanh(. / b)`; None: no bound. A
            bound of 1 (the released code) cannot represent an MI above about 0.5 nat for each
            dimension of y. It depends on the scale of y: 8 allows deviations from 0.02 to 50.
        gather: whether to use the batches of all ranks. Every rank then has the bound, penalty and
            likelihood of one process on the whole batch, and also their gradients once gradients
            are averaged over ranks (as DDP and FSDP do; see `mmvq.distributed.Ranks`). Only sums
            over the clips are exchanged. All ranks must have the same T. The batch size may
            differ, down to 0. For `negatives="all"` only.
        process_group: ranks to gather from; None is the default group.

    Raises:
        ValueError: an argument is out of range.

    Source: Cheng et al. 2020; Eq. 4, 5. The released code uses one permutation, averages squared
    error and log-variance over time separately, and bounds the log-variance by 1.

    Examples:
        >>> club = CLUBEstimator(8, 4, hidden_dim=16)
        >>> club(torch.randn(32, 10, 8), torch.randn(32, 10, 4)).shape
        torch.Size([])
    """

    x_dim: int
    y_dim: int
    hidden_dim: int
    logvar_bound: float | None
    gather: bool
    process_group: dist.ProcessGroup | None
    p_mu: nn.Sequential
    p_logvar: nn.Sequential

    if TYPE_CHECKING:

        def __call__(
            self,
            x: Tensor,
            y: Tensor,
            mask: Tensor | None = None,
            *,
            generator: torch.Generator | None = None,
        ) -> Tensor:
            """As `forward`; `nn.Module` does not type calls."""
            ...

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        hidden_dim: int = 256,
        *,
        negatives: Literal["all", "shuffled"] = "all",
        logvar_bound: float | None = 8.0,
        gather: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_int("CLUBEstimator", 1, x_dim=x_dim, y_dim=y_dim, hidden_dim=hidden_dim)
        check_choice("CLUBEstimator", ("all", "shuffled"), negatives=negatives)
        if logvar_bound is not None:
            check_positive("CLUBEstimator", logvar_bound=logvar_bound)
        if gather and negatives != "all":
            rule = 'gather=True needs negatives="all"'
            hint = "leave one of the two at its default"
            raise ValueError(
                message("CLUBEstimator", rule, hint=hint, negatives=negatives, gather=gather)
            )
        self.x_dim, self.y_dim, self.hidden_dim = x_dim, y_dim, hidden_dim
        self.gather, self.process_group = gather, process_group
        self.negatives, self.logvar_bound = negatives, logvar_bound
        self.p_mu = _mlp(x_dim, hidden_dim, y_dim)
        self.p_logvar = _mlp(x_dim, hidden_dim, y_dim)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(y | x): `[..., x_dim]` -> two of `[..., y_dim]`."""
        x = x.to(next(self.parameters()).dtype)
        mu, logvar = self.p_mu(x), self.p_logvar(x)
        if self.logvar_bound is not None:
            logvar = self.logvar_bound * torch.tanh(logvar / self.logvar_bound)
        return mu, logvar

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Compute the bound of a batch, to measure it; encoders minimise `penalty`.

        Args:
            x: inputs of q, `[B, T, x_dim]` or `[B, x_dim]`, in any float dtype (computed in that of
                the parameters).
            y: samples `[B, T, y_dim]` or `[B, y_dim]`.
            mask: padding mask, bool `[B, T]` or `[B]`, True = valid as sample and as negative.
            generator: random generator for the permutation of `negatives="shuffled"`.

        Returns:
            Scalar in nats. It can be negative if q is far from the true p(y | x).

        Raises:
            ValueError: shapes do not match.
            TypeError: x or y is not a floating point tensor.
        """
        x, y, mask = self._check(x, y, mask)
        mu, logvar = self.posterior(x)
        if self.negatives == "all":
            return functional.club(mu, logvar, y, mask, batch=self._batch(y))
        B, device = y.shape[0], y.device
        if generator is None:  # passing None would compile a graph for each B
            order = torch.randperm(B, device=device)
        else:
            order = torch.randperm(B, generator=generator, device=device)
        return functional.club_shuffled(mu, logvar, y, order, mask)

    def penalty(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        r"""Compute what the encoders of x and y minimise: the share of y that q explains.

        $$\frac{1}{D} \sum_d \rho_d^2$$

        $\rho_d$ is the correlation of dimension d of y and the mean of q, over the valid rows of
        the batch. The scale and the variance of q need not follow the encoders. The penalty is 0
        where nothing correlates, and a mean over D: beside other losses its weight can be 1. It
        sees only what q predicts, the mean of y. Before each step of the encoders, take one on
        `learning_loss`, at a similar learning rate.

        Args:
            x: inputs of q, `[B, T, x_dim]` or `[B, x_dim]`, as for `forward`.
            y: samples `[B, T, y_dim]` or `[B, y_dim]`.
            mask: padding mask, bool `[B, T]` or `[B]`, True = valid.

        Returns:
            Scalar without unit in [0, 1]; see `mmvq.functional.club_penalty`.

        Raises:
            ValueError: shapes do not match.
            TypeError: x or y is not a floating point tensor.

        Source: not in the paper, whose encoders minimise Eq. 5 (Sec. 4.4). With q fixed, Eq. 5 has
        no minimum in y: y can grow without limit, and the other losses suffer.

        Examples:
            >>> club, x = CLUBEstimator(8, 4, hidden_dim=16), torch.randn(32, 10, 8)
            >>> with torch.no_grad():
            ...     mu, _ = club.posterior(x)
            ...     print(f"{club.penalty(x, 5 - 2 * mu):.2f}")
            1.00
        """
        x, y, mask = self._check(x, y, mask)
        mu = self.p_mu(x.to(next(self.parameters()).dtype))
        return functional.club_penalty(mu, y, mask, batch=self._batch(y))

    def log_likelihood(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean of ln q(y | x) over the valid rows, in nats, including constants."""
        x, y, mask = self._check(x, y, mask)
        return functional.gaussian_log_likelihood(*self.posterior(x), y, mask, batch=self._batch(y))

    def learning_loss(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """`-log_likelihood`, which fits q. x and y are detached: the encoders get no gradient."""
        check_floating("CLUBEstimator", x=x, y=y)
        return -self.log_likelihood(x.detach(), y.detach(), mask)

    def extra_repr(self) -> str:
        """The settings."""
        return f"negatives={self.negatives!r}, logvar_bound={self.logvar_bound}"

    def _batch(self, y: Tensor) -> functional.Batch:
        if not self.gather:
            return functional.WHOLE
        return gather_batch_sizes(
            "CLUBEstimator", y, self.process_group, T=y.shape[1] if y.ndim == 3 else 1
        )

    def _check(
        self, x: Tensor, y: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        check_floating("CLUBEstimator", x=x, y=y)
        fits = x.ndim in (2, 3) and x.shape[:-1] == y.shape[:-1]
        if not fits or (x.shape[-1], y.shape[-1]) != (self.x_dim, self.y_dim):
            rule = f"x must be [B, T, {self.x_dim}] and y [B, T, {self.y_dim}], or both without T"
            hint = "pass both with the same B and T; swap them if reversed: q predicts y"
            raise ValueError(message("CLUBEstimator", rule, hint=hint, x=x, y=y))
        if mask is not None:
            check_mask("CLUBEstimator", "mask", mask, x)
        check_finite("CLUBEstimator", {"x": x, "y": y})
        return x if mask is None else torch.where(mask[..., None], x, 0), y, mask


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
