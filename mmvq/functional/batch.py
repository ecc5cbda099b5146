"""Where the other clips of a batch are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Batch:
    """A batch that is all here; `mmvq.distributed.Ranks` is one that is split over ranks.

    Attributes:
        whole: whether all is here.
        offset: how many clips come before the first one here.

    Examples:
        >>> batch, x = Batch(), torch.arange(3)
        >>> batch.whole, batch.gather(x) is x
        (True, True)
    """

    whole = True
    offset = 0

    def gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """What all have along `dim`, in order."""
        return x

    def sum(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Each tensor summed over all."""
        return tensors


WHOLE = Batch()
"""The batch that functions take unless told otherwise: all is here."""
