"""The switches of docs/equations.md that claim the released number: they give it."""

from __future__ import annotations

import pytest
import torch
from support import close, uniform
from torch import Tensor

import mmvq
from mmvq.compat import cmg
from mmvq.compat.cmg.club import log_likelihood
from mmvq.compat.cmg.quantizer import commitment_loss

B, T, D = 5, 7, 6
NAMES = ("audio", "text", "video")
ATOL = 1e-12  # float64 in another order of summation


def features(modalities: int, seed: int = 0) -> dict[str, Tensor]:
    return {name: uniform(B, T, D, seed=seed + i) for i, name in enumerate(NAMES[:modalities])}


@pytest.mark.parametrize("modalities", [2, 3])
def test_commitment(modalities: int) -> None:
    z, e = features(modalities), features(modalities, seed=9)
    released = [
        commitment_loss(z[a], e[a], [e[b] for b in e if b != a], beta=0.25)  # of each modality
        for a in z
    ]
    loss = mmvq.CrossModalCommitmentLoss(beta=0.5)(z, e)
    close(loss, torch.stack(released).sum(), ATOL)


@pytest.mark.parametrize(("modalities", "factor", "self_weight"), [(2, 2, 0.1), (3, 6, 0.05)])
def test_cross_cpc(modalities: int, factor: int, self_weight: float) -> None:
    z, names = features(modalities), NAMES[:modalities]
    released = cmg.CMGCrossCPC(D, names, num_steps=2).double()
    cpc = mmvq.CrossCPC(
        D,
        names,
        num_layers=2,
        num_steps=2,
        min_context=2,
        self_weight=self_weight,
        normalize_over="contexts",
    ).double()
    with torch.no_grad():
        for name in names:
            lstm = released.get_submodule(f"{name}_ar_lstm")
            cpc.contexts[name].load_state_dict(lstm.state_dict())
            for k in range(2):
                linear = released.get_submodule(f"{name}_predictors.{k}")
                linear.bias.zero_()
                cpc.predictors[name][k] = linear.weight
    for start in range(1, T - 2):  # the release counts from 0, and takes the next one
        close(cpc(z, start=start + 1).loss * factor, released(z, start=start).loss, ATOL)
    with pytest.raises(ValueError, match="start"):
        cpc(z, start=1)


def test_code_reset_after() -> None:
    """A code chosen once is reset at the 301st batch without it, by both."""
    z = {name: torch.ones(1, 1, 1) for name in NAMES[:2]}
    released = cmg.CMGQuantizer(1, 2, NAMES[:2])
    quantizer = mmvq.MultiModalEMAQuantizer(
        1, 2, NAMES[:2], reset_rule="any", reset_after=301, init="uniform"
    )
    for codes in (released.embedding, quantizer.ema_codebook.codes):
        codes.copy_(torch.tensor([[1.0], [-50.0]]))
    released.ema_count.fill_(1)
    released.ema_weight.copy_(released.embedding)
    quantizer.ema_codebook.counts.fill_(1)
    quantizer.ema_codebook.sums.copy_(quantizer.codebook)
    first = {name: -50 * x for name, x in z.items()}
    quantizer(first)
    released(first)
    for batch in range(1, 302):
        quantizer(z)
        released(z)
        for codes in (released.embedding, quantizer.codebook):
            assert (codes.min() > -5) == (batch == 301)


def test_log_variance_and_likelihood() -> None:
    """Bound 1 is the released tanh; the likelihood differs by its constant alone."""
    club = mmvq.CLUBEstimator(D, D, logvar_bound=1.0).double()
    x, y = uniform(B, T, D), uniform(B, T, D, seed=1)
    mu, logvar = club.posterior(x)
    close(logvar, club.p_logvar(x).tanh(), ATOL)
    constant = D / 2 * torch.tensor(2 * torch.pi, dtype=torch.float64).log()
    close(club.log_likelihood(x, y) + constant, log_likelihood(y, mu, logvar), ATOL)
