"""The released shared codebook: its search, losses, sequential EMA and reset.

Source: haihuangcode/CMG, code/src/model/main_model_2.py. Shapes: B batch size, T time, D feature
dimension, L number of codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, one_hot

from mmvq.compat.cmg.checks import modality_names, sequences

INIT_BOUND = 1 / 400
RESET_NOISE = 1 / 1024


class CMGQuantizerOutput(NamedTuple):
    """Output of `CMGQuantizer`; the keys of dictionaries are modalities."""

    quantized: dict[str, Tensor]  # [B, T, D], straight-through
    indices: dict[str, Tensor]  # int64 [B, T]
    losses: dict[str, Tensor]  # commitment, scalars
    perplexity: dict[str, Tensor]  # scalars
    matching: Tensor  # L_cmcm, scalar
    equal_num: Tensor  # int64 scalar


def squared_distances(x: Tensor, codes: Tensor) -> Tensor:
    """|x|^2 - 2 x.e + |e|^2 as one addmm: x [N, D], codes [L, D] -> [N, L].

    Eq. 2. As released, floating-point error can make the expansion negative where x equals a code;
    mmvq minimises |e|^2/2 - x.e over centred codes instead.
    """
    squares = x.square().sum(1, keepdim=True) + codes.square().sum(1)
    return torch.addmm(squares, x, codes.T, alpha=-2.0)


def code_probabilities(distances: Tensor) -> Tensor:
    """P = mean over T of softmax over L of -sqrt(d2): [B, T, L] -> [B, L].

    As released, d2 is not clamped: the result is NaN for d2 < 0, and its gradient for d2 = 0. mmvq
    clamps d2.
    """
    return torch.softmax(-distances.sqrt(), dim=-1).mean(dim=1)


def matching_loss(p_a: Tensor, p_b: Tensor) -> Tensor:
    """L_cmcm of one pair: p_a, p_b [B, L] -> scalar.

    S = P_a log(P_b + 1e-10)^T + P_b log(P_a + 1e-10)^T, E = exp(S + max(-S)) and
    L = -1/B sum_i log(E_ii / (sum_j E_ij + 1e-5)). As released, S is shifted by its minimum, so
    that exp can overflow, and only rows are normalised; mmvq uses log_softmax in both directions.
    """
    scores = p_a @ (p_b + 1e-10).log().T + p_b @ (p_a + 1e-10).log().T  # [B, B]
    scores = torch.exp(scores + (-scores).max())
    return -torch.log(scores.diagonal() / (scores.sum(dim=1) + 1e-5)).mean()


def commitment_loss(z: Tensor, own: Tensor, others: Sequence[Tensor], beta: float) -> Tensor:
    """2 beta mse(z, sg e_own) + beta (mean over others of mse(z, sg e_other)): [B, T, D] -> scalar.

    Eq. 8 has beta and beta/2 with the squared norm; mmvq has beta and beta/2 with the mean.
    """
    cross = torch.stack([mse_loss(z, other) for other in others]).mean()
    return 2 * beta * mse_loss(z, own) + beta * cross


def straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """Return z + sg(e - z), the value of the code with the gradient of z: [B, T, D]. As in mmvq."""
    return z + (codes - z).detach()


def perplexity(indices: Tensor, codes: Tensor) -> Tensor:
    """Perplexity exp(-sum_l p_l log(p_l + 1e-10)), where p is the share of each code.

    int64 [B, T] and codes [L, D] -> scalar of the codes' dtype. mmvq's `usage()` replaces it.
    """
    p = one_hot(indices.flatten(), len(codes)).to(codes.dtype).mean(dim=0)
    return torch.exp(-(p * (p + 1e-10).log()).sum())


def equal_clips(indices: Sequence[Tensor]) -> Tensor:
    """Number of clips whose most frequent code (the lowest of a tie) is the same in all modalities.

    M tensors int64 [B, T] -> int64 scalar. It is only logged; mmvq's `usage()` replaces it.
    """
    modes = torch.stack([index.mode(dim=1).values for index in indices])  # [M, B]
    return (modes == modes[0]).all(dim=0).sum()


class CMGQuantizer(nn.Module):
    r"""The released `Cross_quantizer` of two or three modalities.

    Search, losses and outputs use the codebook as it was when forward began. Then, in training
    mode, for each modality m in turn, with n its counts and the partners at the same (b, t),

        N <- decay N + (1 - decay) n
        N <- (N + eps) / (S + L eps) S,  S = sum N
        o <- decay o + (1 - decay) sum over its vectors of (z / 2 + mean of partners / 2)
        e <- o / N

    Last, in training and in eval mode, `unactivated_count` becomes 0 for the codes that any
    modality chose and grows by 1 for the others. A code whose count exceeds `reset_after` is reset:
    its row of `embedding` alone becomes the row of a random other code plus U(-1/1024, 1/1024).

    Differences from `mmvq.MultiModalEMAQuantizer`: the update is sequential (decay^M per step), the
    smoothing is written back, counts start at 0, the partner is aligned, a code that one modality
    uses is never reset, the next EMA step undoes a reset (o and N are kept), and eval mode writes.

    Args:
        dim: feature dimension D.
        codebook_size: number of codes L.
        modalities: two or three names, in the order of the EMA. Released: audio, video, text.
        decay: share of the old state that each modality's update keeps.
        eps: Laplace smoothing of the counts.
        beta: commitment weight.
        reset_after: number of batches without use that a code survives.

    Raises:
        ValueError: there are not two or three modalities, or a name appears twice.
    """

    embedding: Tensor  # [L, D] e
    ema_count: Tensor  # [L] N
    ema_weight: Tensor  # [L, D] o
    unactivated_count: Tensor  # [L] batches since last used
    modalities: tuple[str, ...]
    decay: float
    eps: float
    beta: float
    reset_after: int

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        modalities: Sequence[str] = ("audio", "video"),
        *,
        decay: float = 0.99,
        eps: float = 1e-5,
        beta: float = 0.25,
        reset_after: int = 300,
    ) -> None:
        super().__init__()
        self.modalities = modality_names("CMGQuantizer", modalities)
        self.decay, self.eps, self.beta, self.reset_after = decay, eps, beta, reset_after
        embedding = torch.empty(codebook_size, dim).uniform_(-INIT_BOUND, INIT_BOUND)
        self.register_buffer("embedding", embedding)
        self.register_buffer("ema_count", torch.zeros(codebook_size))
        self.register_buffer("ema_weight", embedding.clone())
        self.register_buffer("unactivated_count", -torch.ones(codebook_size))

    def forward(
        self, features: Mapping[str, Tensor], *, generator: torch.Generator | None = None
    ) -> CMGQuantizerOutput:
        """Quantize all modalities and update the state.

        Args:
            features: modality -> features [B, T, D], all of one shape.
            generator: random generator for resets, on the device of the codebook.

        Raises:
            ValueError: the names differ from `modalities`, or the shapes from each other.
        """
        L, D = self.embedding.shape
        z = sequences("CMGQuantizer", features, self.modalities, D)
        M, (B, T, _) = len(z), z[0].shape
        codes = self.embedding.clone()  # a snapshot, as the state changes in place below
        distances = [squared_distances(x.reshape(-1, D), codes).view(B, T, L) for x in z]
        indices = [d.argmin(dim=-1) for d in distances]  # [B, T]
        chosen = [codes[index] for index in indices]  # [B, T, D]
        others = [chosen[:m] + chosen[m + 1 :] for m in range(M)]
        losses = [commitment_loss(z[m], chosen[m], others[m], self.beta) for m in range(M)]
        pairs = combinations([code_probabilities(d) for d in distances], 2)
        matching = 0.5 * torch.stack([matching_loss(p_a, p_b) for p_a, p_b in pairs]).sum()
        used = torch.stack(indices).flatten(1)  # [M, BT]
        if self.training:
            self._update(torch.stack(z).detach().flatten(1, 2), used)
        self._reset(used, generator)
        return CMGQuantizerOutput(
            quantized=self._named([straight_through(z[m], chosen[m]) for m in range(M)]),
            indices=self._named(indices),
            losses=self._named(losses),
            perplexity=self._named([perplexity(index, codes) for index in indices]),
            matching=matching,
            equal_num=equal_clips(indices),
        )

    def infer(self, x: Tensor) -> Tensor:
        """Quantize one modality, x [..., D], straight-through, without changing the state."""
        distances = squared_distances(x.reshape(-1, x.shape[-1]), self.embedding)
        return straight_through(x, self.embedding[distances.argmin(dim=-1)].view_as(x))

    @torch.no_grad()
    def _update(self, z: Tensor, indices: Tensor) -> None:
        """Apply the EMA steps of the class docstring (Eq. 7): z [M, BT, D], indices [M, BT]."""
        M, L, rate = len(z), len(self.embedding), 1 - self.decay
        mixed = 0.5 * z + 0.5 * (z.sum(dim=0) - z) / (M - 1)  # [M, BT, D]
        for m in range(M):
            chosen = one_hot(indices[m], L).to(z.dtype)  # [BT, L]
            count = self.decay * self.ema_count + rate * chosen.sum(dim=0)
            mass = count.sum()
            self.ema_count.copy_((count + self.eps) / (mass + L * self.eps) * mass)
            self.ema_weight.mul_(self.decay).add_(chosen.T @ mixed[m], alpha=rate)
            self.embedding.copy_(self.ema_weight / self.ema_count[:, None])

    @torch.no_grad()
    def _reset(self, indices: Tensor, generator: torch.Generator | None) -> None:
        """Count batches without use, then reset the codes beyond `reset_after`: indices [M, BT].

        The release draws from Python's generator, and only if a code expires. Here the choice and
        the noise are drawn at every call, which needs no synchronisation.
        """
        self.unactivated_count.add_(1).index_fill_(0, indices.flatten(), 0.0)
        expired = self.unactivated_count > self.reset_after  # [L]
        source = torch.multinomial((~expired).float(), len(expired), True, generator=generator)
        noise = torch.empty_like(self.embedding)
        noise.uniform_(-RESET_NOISE, RESET_NOISE, generator=generator)
        fresh = self.embedding[source] + noise
        self.embedding.copy_(torch.where(expired[:, None], fresh, self.embedding))
        self.unactivated_count.masked_fill_(expired, 0.0)

    def _named(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.modalities, values, strict=True))
