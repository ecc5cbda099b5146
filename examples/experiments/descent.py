"""Training of the small networks that downstream tasks put on frozen codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn


class Scale(nn.Module):
    """Centre codes and scale them to a mean variance of 1, so that heads do not depend on scale.

    Args:
        codes: Vectors [..., D] to measure mean and variance on.
    """

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        x = rearrange(codes, "... d -> (...) d")
        self.mean = nn.Buffer(x.mean(0))
        self.deviation = nn.Buffer(x.var(0, correction=0).mean().sqrt().clamp(min=1e-12))

    def forward(self, codes: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return (codes - self.mean) / self.deviation


def descend(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    examples: int,
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    batch_size: int = 256,
) -> None:
    """Minimize a loss with Adam and cosine decay.

    Args:
        model: Module to train, in place.
        loss: Loss of a batch, given the indices [batch_size] of examples drawn with replacement.
        examples: Number of examples.
        steps: Number of optimizer steps.
        learning_rate: Learning rate of the first step.
        weight_decay: Weight of the L2 penalty.
        batch_size: Examples in a batch.
    """
    optimizer = torch.optim.Adam(model.parameters(), learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        value = loss(torch.randint(examples, (batch_size,)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
