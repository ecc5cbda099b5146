"""Clips as the model takes them: standardised, a batch at a time, from memory or from disk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .clips import Clips
from .errors import DataError
from .ranks import local_part
from .standardize import Standardizer
from .workers import start_worker

IN_MEMORY = 1.0  # GiB of standardised features


class Batch(NamedTuple):
    """B clips.

    Attributes:
        features: Name -> [B, T, P, C], P cells of a segment.
        masks: Name -> bool [B, T], True = valid; None if everything in the data set is valid.
    """

    features: dict[str, Tensor]
    masks: dict[str, Tensor] | None = None


class Batches(Dataset[Batch]):
    """Gives standardised batches of clips.

    Standardised features are kept in memory if they are small enough, in float32. Otherwise they
    are stored on disk in float16, and read batch by batch.

    Args:
        clips: The clips.
        standardizer: Their standardizer; None: the features of the clips are standardised.
        in_memory: Maximum size of standardised features to keep in memory, in GiB.
    """

    def __init__(
        self,
        clips: Clips,
        standardizer: Standardizer | None = None,
        in_memory: float = IN_MEMORY,
    ) -> None:
        self.streamed = False
        if standardizer is not None:
            width = {name: axes.shape[1] for name, axes in standardizer.axes.items()}
            size = sum(4 * math.prod(x.shape[:-1]) * width[m] for m, x in clips.features.items())
            self.streamed = size > in_memory * 2**30
            reduce = standardizer.on_disk if self.streamed else standardizer.transform
            clips = clips.with_features(reduce(clips))
        self.clips, self.segments = clips, clips.segments
        self.shapes = {
            name: (math.prod(x.shape[2:-1]), x.shape[-1]) for name, x in clips.features.items()
        }

    def __getitem__(self, rows: Tensor) -> Batch:
        """Read the clips with these indices."""
        clips = self.clips
        features = {
            name: rearrange(clips.read(name, rows), "b t ... c -> b t (...) c")
            for name in clips.features
        }
        masks = {name: clips.valid(name, rows) for name in features} if clips.masks else None
        return Batch(features, masks)

    def __getitems__(self, rows: list[int]) -> Batch | DataError:
        """As `__getitem__`, for a `DataLoader`, whose workers return errors as they are."""
        try:
            return self[torch.tensor(rows)]
        except DataError as error:
            return error

    @staticmethod
    def ready(batch: Batch, device: torch.device, segments: Tensor | None = None) -> Batch:
        """Move a batch to the device, in at least float32.

        Args:
            batch: A batch of this data set.
            device: Device of the model.
            segments: int64, indices of the segments to keep; None: all.
        """

        def moved(x: Tensor) -> Tensor:
            x = x.to(device, non_blocking=True)
            return x if segments is None else x[:, segments.to(device)]

        x = {name: moved(v) for name, v in batch.features.items()}
        x = {name: v.to(torch.promote_types(v.dtype, torch.float32)) for name, v in x.items()}
        masks = None if batch.masks is None else {m: moved(v) for m, v in batch.masks.items()}
        return Batch(x, masks)

    def __call__(self, rows: Tensor, device: torch.device, size: int = 100) -> Iterator[Batch]:
        """Batches of `size` of the clips with these indices, in order, on the device."""
        for part in rows.split(size):
            yield self.ready(self[part], device)


class Order(Sampler[list[int]]):
    """The batches of an epoch in random order: this rank's equal part of each.

    The order is drawn with torch's global generator, whose state is the same on all ranks and part
    of the checkpoints.

    Args:
        rows: int64, indices of the clips.
        batch_size: Clips in a batch, of all ranks together.
        group: Batches in a step. Clips that do not fill a step are left out.
    """

    def __init__(self, rows: Tensor, batch_size: int, group: int = 1) -> None:
        self.rows, self.order, self.batch_size = rows, rows, batch_size
        self.steps, self.group = len(rows) // (batch_size * group), group

    def __len__(self) -> int:
        return self.steps * self.group

    def shuffle(self) -> None:
        """Draw the order of the next epoch."""
        self.order = self.rows[torch.randperm(len(self.rows))]

    def __iter__(self) -> Iterator[list[int]]:
        used = self.order[: len(self) * self.batch_size]
        for batch in used.split(self.batch_size):
            yield local_part(batch).tolist()


class Loader:
    """The batches of an epoch, in the order of `Order`, for each iteration.

    Nothing is drawn from torch's global generator here.

    Args:
        batches: The data set.
        order: Its batches.
        workers: Number of processes that read ahead; 0: batches are read by this process.
        device: Device of the model; for a GPU, batches are read into pinned memory.
    """

    def __init__(self, batches: Batches, order: Order, workers: int, device: torch.device) -> None:
        self.loader: DataLoader[Batch | DataError] = DataLoader(
            batches,
            batch_sampler=order,
            collate_fn=_as_it_is,
            num_workers=workers,
            worker_init_fn=start_worker if workers else None,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Batch]:
        """Give the batches.

        Raises:
            DataError: Clips cannot be read.
        """
        try:
            for batch in self.loader:
                if isinstance(batch, DataError):
                    raise batch
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            first = str(error).partition("\n")[0]
            rule = f"a process that reads batches has ended ({first})"
            raise DataError(f"{rule}. Hint: --workers 0, or more shared memory.") from error

    def close(self) -> None:
        """End the processes that read ahead; another iteration starts new ones."""
        self.loader._iterator = None


def _as_it_is(batch: Batch | DataError) -> Batch | DataError:
    return batch
