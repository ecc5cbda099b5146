"""CLUB: an upper bound of the mutual information of two representations, to be minimised."""

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
    check_number,
    message,
)
from mmvq.distributed import OverRanks, gather_batch_sizes
from mmvq.pretrained import Pretrained


class CLUBEstimator(OverRanks, Pretrained):
    r"""vCLUB: an upper estimate of I(x; y) by a learned q(y | x) (Eq. 4, 5).

    $$\hat I = \frac{1}{B} \sum_i \Big[ \frac{1}{T} \sum_t \ln q(y_{it} | x_{it})
      - \frac{1}{B T} \sum_j \sum_t \ln q(y_{jt} | x_{it}) \Big],
      \qquad q(y | x) = \mathcal N(\mu(x), \mathrm{diag}\, \sigma^2(x))$$

    The direction matters: q predicts y from x; in the paper x is the semantic and y the
    modality-specific feature. Train in turns: some steps on `learning_loss` with an optimiser of
    this module's parameters, then one step of the encoders on `forward`.

    Args:
        x_dim: width of x.
        y_dim: width of y.
        hidden_dim: width of the two networks, each Linear-ReLU-Linear.
        negatives: `"all"` takes every pair of the batch at the same t, in O(B T D) by a closed
            form; `"shuffled"` draws one permutation of the batch.
        logvar_bound: b > 0 keeps the log-variance in (-b, b) as `b tanh(. / b)`; None leaves it
            free. A bound of 1 (the released code) cannot represent an MI above about 0.5 nat for
            each dimension of y. It is in the units of y: 8 holds deviations from 0.02 to 50.
        gather: bound and likelihood are those of one process on the batches of all ranks, on every
            rank, and so are their gradients once the ranks' gradients are averaged (DDP, FSDP; see
            `mmvq.distributed.Ranks`): sums of y and of its squares are exchanged, no rows. All
            ranks must bring the same T; B may differ, down to 0. For `negatives="all"` only.
        process_group: the ranks to gather from; None is the default group.

    Raises:
        ValueError: an argument out of range.

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
            """As `forward`: `nn.Module` gives a call no types."""
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
            check_number("CLUBEstimator", 1e-6, 1e6, logvar_bound=logvar_bound)
        if gather and negatives != "all":
            raise ValueError(
                message(
                    "CLUBEstimator",
                    'gather=True needs negatives="all"',
                    hint="leave one of the two at its default",
                    negatives=negatives,
                    gather=gather,
                )
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
        """The bound of a batch, to be minimised by the encoders of x and y.

        Args:
            x: `[B, T, x_dim]` or `[B, x_dim]`, any float dtype (computed in that of the
                parameters).
            y: `[B, T, y_dim]` or `[B, y_dim]`.
            mask: bool `[B, T]` or `[B]`, True = valid, as sample and as negative.
            generator: draws the permutation of `negatives="shuffled"`.

        Returns:
            A scalar in nats. It can be negative where q is far from the truth.

        Raises:
            ValueError: shapes that do not fit.
            TypeError: x or y is no floating point tensor.
        """
        x, y, mask = self._check(x, y, mask)
        mu, logvar = self.posterior(x)
        if self.negatives == "all":
            return functional.club(mu, logvar, y, mask, batch=self._batch(y))
        B, device = y.shape[0], y.device
        if generator is None:  # as an argument, None would compile a graph for each B
            order = torch.randperm(B, device=device)
        else:
            order = torch.randperm(B, generator=generator, device=device)
        return functional.club_shuffled(mu, logvar, y, order, mask)

    def log_likelihood(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean of ln q(y | x) over the valid rows, in nats, with all constants."""
        x, y, mask = self._check(x, y, mask)
        return functional.gaussian_log_likelihood(*self.posterior(x), y, mask, batch=self._batch(y))

    def learning_loss(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """`-log_likelihood`, to fit q; x and y are detached, so that no encoder can follow it."""
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
            raise ValueError(
                message(
                    "CLUBEstimator",
                    f"x must be [B, T, {self.x_dim}] and y [B, T, {self.y_dim}], or both without T",
                    hint="give both one B and T; swap them if they came reversed: q predicts y",
                    x=x,
                    y=y,
                )
            )
        if mask is not None:
            check_mask("CLUBEstimator", "mask", mask, x)
        check_finite("CLUBEstimator", {"x": x, "y": y})
        return x if mask is None else torch.where(mask[..., None], x, 0), y, mask


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
