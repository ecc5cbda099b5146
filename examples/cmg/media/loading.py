"""Decode clips in worker processes, in order."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import NamedTuple

from ..workers import start_worker
from .decode import Cut, Decoded, decode, undecoded
from .folder import Source

_AHEAD = 4  # clips for each worker that are decoded ahead


class Loaded(NamedTuple):
    """A decoded clip, and the seconds that it took."""

    id: str
    clip: Decoded
    seconds: float


def load(
    sources: Sequence[Source], cut: Cut, batch_size: int, workers: int | None
) -> Iterator[list[Loaded]]:
    """Give the decoded clips in batches, in the order of `sources`.

    A clip whose decoder crashes is not valid, and has a note; with 0 workers, it ends this process.

    Args:
        sources: The files of the clips.
        cut: How to cut them.
        batch_size: Clips in a batch.
        workers: Processes that decode; None: one for each core, at most 8; 0: this process.
    """
    if workers is None:
        workers = min(os.cpu_count() or 1, 8)
    if workers:
        clips = _in_processes(sources, cut, workers)
    else:
        clips = (_load(source, cut) for source in sources)
    while batch := [*islice(clips, batch_size)]:
        yield batch


def _load(source: Source, cut: Cut) -> Loaded:
    begun = time.perf_counter()
    clip = decode(source, cut)
    return Loaded(source.id, clip, time.perf_counter() - begun)


def _in_processes(sources: Sequence[Source], cut: Cut, workers: int) -> Iterator[Loaded]:
    done, ahead = 0, _AHEAD * workers
    while done < len(sources):
        try:
            for item in _in_order(sources[done:], cut, workers, ahead):
                yield item
                done += 1
        except BrokenProcessPool:  # a decoder has crashed, on one of the clips ahead
            for source in sources[done : done + ahead]:
                yield _alone(source, cut)
                done += 1


def _in_order(sources: Sequence[Source], cut: Cut, workers: int, ahead: int) -> Iterator[Loaded]:
    waiting: deque[Future[Loaded]] = deque()
    pool = ProcessPoolExecutor(workers, initializer=start_worker)
    try:
        for source in sources:
            waiting.append(pool.submit(_load, source, cut))
            if len(waiting) == ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _alone(source: Source, cut: Cut) -> Loaded:
    with ProcessPoolExecutor(1, initializer=start_worker) as pool:
        try:
            return pool.submit(_load, source, cut).result()
        except BrokenProcessPool:
            return Loaded(source.id, undecoded(cut, "the decoder crashed"), 0.0)
