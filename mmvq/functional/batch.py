"""A batch that is not split over ranks, the default of all functions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Batch:
    """A batch on one process; `mmvq.distributed.Ranks` is a batch that is split over ranks.

    Attributes:
        whole: whether this process holds the whole batch.
        offset: number of clips on the ranks before this one.

    Examples:
        >>> batch, x = Batch(), torch.arange(3)
        >>> batch.whole, batch.gather(x) is x
        (True, True)
    """

    whole = True
    offset = 0

    def gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """Concatenate the clips of all ranks along `dim`, in rank order."""
        return x

    def sum(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Sum each tensor over all ranks."""
        return tensors


WHOLE = Batch()
"""The default batch of all functions, which is not split."""
