"""Codebooks in averaged models (SWA, EMA of the weights).

The mean of several codes is not the code of their mean counts and sums, and the mean of steps, ages
or usage has no meaning. `torch.optim.swa_utils.AveragedModel` averages all buffers alike and has no
hook. Importing mmvq therefore makes it call `settle_averaged` after each update of its buffers.
Lightning's callbacks use that class.
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
    r"""Make averaged codebooks consistent: $e = o / \tilde N$, integers copied from the newest.

    `AveragedModel` and Lightning call it themselves. Call it after a custom average, such as a loop
    that applies `lerp` to each buffer.

    Args:
        averaged: model that holds the means; its codebooks are changed in place.
        newest: model that was averaged last, with the same codebooks in the same order.

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
def _only_floats(books: Iterable[EMACodebook]) -> Iterator[None]:
    """Hide their integer buffers, which torch's average of many tensors on a GPU refuses."""
    whole = [(book, book._buffers) for book in books]
    try:
        for book, buffers in whole:
            book._buffers = {n: x for n, x in buffers.items() if x is None or x.is_floating_point()}
        yield
    finally:
        for book, buffers in whole:
            book._buffers = buffers


def _settled(update: Callable[[AveragedModel, nn.Module], None]) -> Callable[..., None]:
    @wraps(update)
    def update_parameters(self: AveragedModel, model: nn.Module) -> None:
        if not self.use_buffers:  # then torch copies all buffers
            update(self, model)
            return
        averaging = bool(self.n_averaged > 0)  # the first update copies
        pairs = _pairs(self.module, model)
        for mine, theirs in pairs:  # float64 data may have made the newest wider
            mine.match_dtype(theirs.codes.dtype)
        with _only_floats(book for pair in pairs for book in pair):
            update(self, model)
        for mine, theirs in pairs:
            _copy_integers(mine, theirs)
            if averaging:
                mine.derive_codes()

    return update_parameters


# mypy refuses to assign to a method
AveragedModel.update_parameters = _settled(AveragedModel.update_parameters)  # type: ignore[method-assign]
