"""The released CLUB estimator of an upper bound on mutual information.

Source: haihuangcode/CMG, used in code/src/pretrain.py. Shapes: B batch size, T time, X and Y
feature dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def log_likelihood(y: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """Mean over (b, t) of sum over Y of (-(y - mu)^2 / exp(logvar) - logvar) / 2: [B, T, Y] -> [].

    This is the Gaussian log-density without its constant, with the variance at each t.
    """
    return ((-(y - mu).square() / logvar.exp() - logvar) / 2).sum(dim=-1).mean()


def clip_log_density(y: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """-1/2 sum over Y of mean_t (y - mu)^2 / exp(mean_t logvar): [B, T, Y] -> [B].

    As released, squares and log-variances are averaged over t separately, so that this density is
    not the one that `log_likelihood` fits.
    """
    return -0.5 * ((y - mu).square().mean(dim=1) / logvar.mean(dim=1).exp()).sum(dim=-1)


def three_hidden_layers(in_dim: int, hidden_dim: int, out_dim: int) -> list[nn.Module]:
    """Three times Linear and ReLU, then Linear: entries 0, 2, 4 and 6 of `p_mu` and `p_logvar`."""
    layers: list[nn.Module] = []
    for width in (in_dim, hidden_dim, hidden_dim):
        layers += [nn.Linear(width, hidden_dim), nn.ReLU()]
    return [*layers, nn.Linear(hidden_dim, out_dim)]


class CMGCLUB(nn.Module):
    """The released `{modality}_mi_net`: q(y | x) = N(mu(x), exp(logvar(x))), logvar in (-1, 1).

    The bound contrasts each clip with one other clip, y[permutation]; Eq. 5 and
    `mmvq.CLUBEstimator` average over all pairs. It is noisy and can be negative. The tanh of the
    log-variance limits variances to (0.37, 2.72).

    Args:
        x_dim: dimension of the condition. Released: 256, the straight-through codes.
        y_dim: dimension of the modality-specific features. Released: 512 for video, otherwise 256.
        hidden_dim: width of the hidden layers.
    """

    def __init__(self, x_dim: int, y_dim: int, hidden_dim: int = 128) -> None:
        super().__init__()
        self.p_mu: nn.Sequential = nn.Sequential(*three_hidden_layers(x_dim, hidden_dim, y_dim))
        self.p_logvar: nn.Sequential = nn.Sequential(
            *three_hidden_layers(x_dim, hidden_dim, y_dim), nn.Tanh()
        )

    def conditional(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and log-variance of q(y | x): x [B, T, X] -> two [B, T, Y]."""
        return self.p_mu(x), self.p_logvar(x)

    def log_likelihood(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean of log q(y | x), to be maximised: x [B, T, X], y [B, T, Y] -> scalar."""
        return log_likelihood(y, *self.conditional(x))

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        *,
        permutation: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the released estimate of I(x; y): x [B, T, X], y [B, T, Y] -> scalar.

        Args:
            x: condition.
            y: modality-specific features.
            permutation: negative clip of each clip, int64 [B]; drawn at random if None.
            generator: random generator for that draw, on the CPU.
        """
        if permutation is None:
            permutation = torch.randperm(len(x), generator=generator).to(x.device)
        mu, logvar = self.conditional(x)
        negative = clip_log_density(y[permutation], mu, logvar)
        return (clip_log_density(y, mu, logvar) - negative).mean()
