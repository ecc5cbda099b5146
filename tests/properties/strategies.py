"""What the properties are drawn from: sizes, features, masks, partners and quantizers.

Features are float64 unless a property is about precision, so that rounding (about 1e-9, see
`Draw.slack`) is far below anything that a wrong result would change. Indices are compared exactly:
in float64 the two codes nearest to a random vector never differ by as little as rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from support import close
from torch import Tensor

from mmvq import EMACodebook, MultiModalEMAQuantizer

NAMES = ("video", "text", "audio")  # not in sorted order, on purpose
EPS = torch.finfo(torch.float64).eps
Tensors = Mapping[str, Tensor]


def clip_mean(z: Tensor, others: Tensors, masks: Tensors) -> Tensor:
    """A callable partner: the mean of all valid vectors of the other modalities in the clip."""
    total, count = torch.zeros_like(z[:, :1]), z.new_zeros(z.shape[0], 1, 1)
    for name, other in others.items():
        valid = masks[name][..., None]
        total = total + torch.where(valid, other, 0).sum(1, keepdim=True)
        count = count + valid.sum(1, keepdim=True)
    return torch.where(count > 0, total / count.clamp(min=1), z)


PARTNERS = ("attention", "aligned", "none", clip_mean)
WIRINGS = [
    (NAMES[:1], "attention"),
    *((NAMES[:m], partner) for m in (2, 3) for partner in PARTNERS),
]


def every_wiring(test: Callable[..., None]) -> Callable[..., None]:
    """Run a property for two and three modalities under every kind of partner, and for one."""
    return pytest.mark.parametrize(("names", "partner"), WIRINGS)(test)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@dataclass(frozen=True)
class Draw:
    """Sizes and a seed, and what they make."""

    B: int
    T: int
    D: int
    L: int
    strided: bool  # features are not contiguous
    seed: int

    def features(self, names: Sequence[str], step: int = 0) -> dict[str, Tensor]:
        """A batch: name -> `[B, T, D]`, another one at each step."""
        z = {}
        for m, name in enumerate(names):
            x = randn(self.B, self.T, self.D, seed=self.seed + 10 * step + m)
            z[name] = x.permute(2, 0, 1).contiguous().permute(1, 2, 0) if self.strided else x
        return z

    def masks(self, names: Sequence[str], step: int = 0) -> dict[str, Tensor]:
        """About two thirds valid; whole clips and modalities may be masked."""
        noise = randn(len(names), self.B, self.T, seed=self.seed + 10 * step + 7)
        return dict(zip(names, noise > -0.4, strict=True))

    def codes(self) -> Tensor:
        """`[L, D]`, spread like the features, all distinct."""
        return randn(self.L, self.D, seed=self.seed + 5)

    def quantizer(self, names: Sequence[str], **settings: Any) -> MultiModalEMAQuantizer:
        """A quantizer in training, of this draw's codes, that moves fast and never resets."""
        settings = {"decay": 0.9, "reset_after": None, "init": "uniform"} | settings
        module = MultiModalEMAQuantizer(self.D, self.L, names, **settings)
        start(module.ema_codebook, self.codes())
        return module

    def slack(self, *features: Tensors) -> float:
        """How far two float64 computations of one step may lie apart: in sums, codes or outputs.

        With X the largest component, a logit z.z' / sqrt(D) is off by at most D^1.5 X^2 eps, a
        softmax weight over S vectors by twice that and S eps (relatively), so a contribution by
        c = (2 D^1.5 X^2 + 2 S + 4) eps X; a sum of n contributions by n (c + n eps X). Counts start
        at 1 and shrink to decay^steps >= 1/2 at least, so that the division at most doubles this.
        """
        X = max(float(x.abs().max()) for z in features for x in z.values()) + 1
        n = sum(x.shape[0] * x.shape[1] for z in features for x in z.values()) + self.L
        S = max(x.shape[0] * x.shape[1] for z in features for x in z.values())
        return 2 * n * (2 * self.D**1.5 * X**2 + 2 * S + 4 + n) * EPS * X


def draws() -> st.SearchStrategy[Draw]:
    """Ones, primes and sizes that are no power of two."""
    return st.builds(
        Draw,
        B=st.sampled_from((1, 2, 5)),
        T=st.sampled_from((1, 3, 7)),
        D=st.sampled_from((1, 3, 8, 13)),
        L=st.sampled_from((1, 5, 12, 63)),
        strided=st.booleans(),
        seed=st.integers(0, 10**6),
    )


def start(book: EMACodebook, codes: Tensor) -> None:
    """Begin at these codes, each with a count of 1."""
    book.match_dtype(codes.dtype)
    book.codes.copy_(codes)
    book.sums.copy_(codes)
    book.counts.fill_(1)


def pending(module: MultiModalEMAQuantizer) -> tuple[Tensor, Tensor, Tensor]:
    """Take out the accumulated statistics: as one buffer, and as counts `[M, L]`, sums `[L, D]`."""
    book = module.ema_codebook
    G, L, D = book.groups, book.codebook_size, book.dim
    flat = book.take_pending()
    assert flat is not None
    counts, sums = flat.split([G * L, L * D])
    return flat, counts.view(G, L), sums.view(L, D)


def assert_same_bits(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), key


def assert_near_state(actual: Tensors, expected: Tensors, atol: float) -> None:
    """Codes and sums within `atol`; counts are whole numbers before the decay, hence equal."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        close(actual[key], value, atol if key.endswith(("codes", "sums")) else 0)
