"""Averages of weights (SWA, EMA of a model): what a codebook needs after one.

A mean of codes is not the code of the mean counts and sums, and steps, ages and usage have no mean.
torch averages every buffer alike, without a hook, so importing mmvq lets
`torch.optim.swa_utils.AveragedModel` call `settle_averaged` after each update of its buffers.
Lightning's callbacks build on that class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps

from torch import nn
from torch.optim.swa_utils import AveragedModel

from mmvq.checks import message
from mmvq.codebook import EMACodebook


def settle_averaged(averaged: nn.Module, newest: nn.Module) -> None:
    r"""Make codebooks whole after their buffers were averaged: $e = o / \tilde N$, integers copied.

    `AveragedModel` and Lightning need no call. Call it after an average of your own, a loop over
    `state_dict` or buffers that `lerp`s each.

    Args:
        averaged: the model that holds the means; written.
        newest: the model that was averaged last, with the same codebooks in the same order.

    Raises:
        ValueError: the two hold different numbers of codebooks.

    Examples:
        >>> student = EMACodebook(2, 4)
        >>> teacher = EMACodebook(2, 4)
        >>> student.accumulate(torch.ones(1, 2), torch.tensor([3]))
        >>> for mean, new in zip(teacher.buffers(), student.apply().buffers()):
        ...     _ = mean.copy_(0.9 * mean + 0.1 * new)
        >>> settle_averaged(teacher, student)
        >>> teacher.codes[3].round(decimals=3), int(teacher.steps)
        (tensor([1., 1.]), 1)
    """
    for mine, theirs in _pairs(averaged, newest):
        _copy_integers(mine, theirs)
        mine.derive_codes()


def _pairs(averaged: nn.Module, newest: nn.Module) -> list[tuple[EMACodebook, EMACodebook]]:
    books = [
        [m for m in model.modules() if isinstance(m, EMACodebook)] for model in (averaged, newest)
    ]
    if len(books[0]) != len(books[1]):
        rule = "averaged and newest must hold as many codebooks"
        hint = "pass two models of one architecture"
        counts = {"averaged": len(books[0]), "newest": len(books[1])}
        raise ValueError(message("settle_averaged", rule, hint=hint, **counts))
    return list(zip(*books, strict=True))


def _copy_integers(mine: EMACodebook, theirs: EMACodebook) -> None:
    for x, y in zip(mine.buffers(), theirs.buffers(), strict=True):
        if not x.is_floating_point():
            x.copy_(y)


@contextmanager
def _floats_alone(books: Iterable[EMACodebook]) -> Iterator[None]:
    """Without their integers: what torch takes to average many tensors on a GPU refuses them."""
    whole = [(book, book._buffers) for book in books]
    try:
        for book, buffers in whole:
            book._buffers = {n: x for n, x in buffers.items() if x is None or x.is_floating_point()}
        yield
    finally:
        for book, buffers in whole:
            book._buffers = buffers


def _settling(update: Callable[[AveragedModel, nn.Module], None]) -> Callable[..., None]:
    @wraps(update)
    def update_parameters(self: AveragedModel, model: nn.Module) -> None:
        if not self.use_buffers:  # torch copies them
            update(self, model)
            return
        averaging = bool(self.n_averaged > 0)  # the first time, torch copies too
        pairs = _pairs(self.module, model)
        for mine, theirs in pairs:  # which float64 data may have made wider since
            mine.match_dtype(theirs.codes.dtype)
        with _floats_alone(book for pair in pairs for book in pair):
            update(self, model)
        for mine, theirs in pairs:
            _copy_integers(mine, theirs)
            if averaging:
                mine.derive_codes()

    return update_parameters


# mypy takes no method for a variable
AveragedModel.update_parameters = _settling(AveragedModel.update_parameters)  # type: ignore[method-assign]
