"""Decode clips in worker processes, in order."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from ..workers import start_worker
from .decode import Cut, Decoded, decode
from .folder import Source

_AHEAD = 4  # clips that a worker decodes ahead
_NEAR = 32  # clips that a message names


class Loaded(NamedTuple):
    """A decoded clip, and the seconds that it took."""

    id: str
    clip: Decoded
    seconds: float


class _Sources(Dataset[Loaded]):
    """Decodes the clip that it is indexed with."""

    def __init__(self, sources: Sequence[Source], cut: Cut) -> None:
        self.sources, self.cut = sources, cut

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, k: int) -> Loaded:
        begun = time.perf_counter()
        clip = decode(self.sources[k], self.cut)
        return Loaded(self.sources[k].id, clip, time.perf_counter() - begun)


def load(
    sources: Sequence[Source], cut: Cut, batch_size: int, workers: int | None
) -> Iterator[list[Loaded]]:
    """Give the decoded clips in batches, in the order of `sources`.

    Args:
        sources: The files of the clips.
        cut: How to cut them.
        batch_size: Clips in a batch.
        workers: Processes that decode; None: one for each core, at most 8; 0: this process.
    """
    if workers is None:
        workers = min(os.cpu_count() or 1, 8)
    if len(sources) < 2:
        workers = 0
    loader = DataLoader(
        _Sources(sources, cut),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=_AHEAD if workers else None,
        collate_fn=_as_it_is,
        worker_init_fn=start_worker if workers else None,
        generator=torch.Generator(),
    )
    batch: list[Loaded] = []
    for k, item in enumerate(loader, 1):
        batch.append(item)
        if len(batch) == batch_size or k == len(sources):
            yield batch
            batch = []


@contextmanager
def deaths(left: Callable[[], Sequence[Source]]) -> Iterator[None]:
    """Where clips of `load` are used: a worker that dies raises an error that says near which clip.

    The signal of its death can arrive anywhere in this process.

    Args:
        left: Gives the clips that are not done.

    Raises:
        DataError: A worker has died.
    """
    try:
        yield
    except RuntimeError as error:
        if not re.search("DataLoader worker .* (exited unexpectedly|killed by)", str(error)):
            raise
        near = ", ".join(source.id for source in left()[:_NEAR])
        rule = f"a process that decodes has died, on one of {near}, ..."
        hint = "find the file with --workers 0 and remove it; then use --resume"
        raise DataError(f"{rule}. Hint: {hint}.") from error


def _as_it_is(item: Loaded) -> Loaded:
    return item
