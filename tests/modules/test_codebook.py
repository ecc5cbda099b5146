"""The codebook alone: its steps, and how it starts."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from support import DTYPES, bools, close, rounding, same, state, uniform
from torch import Tensor, nn

from mmvq import EMACodebook, update_codebooks
from mmvq.codebook import Init
from mmvq.functional import UNSEEN, code_statistics_ref, ema_update_ref, kmeans, sample_rows

D, L, N = 4, 6, 40


def step(book: EMACodebook, x: Tensor, groups: Tensor | None = None) -> Tensor:
    indices = book.search(x)
    book.accumulate(x, indices, groups)
    book.apply()
    return indices


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_step_is_equation_7(dtype: torch.dtype) -> None:
    book = EMACodebook(D, L, decay=0.8).to(dtype)
    x = uniform(N, D, dtype=dtype)
    before = state(book)
    indices = step(book, x)
    counts, sums = code_statistics_ref(x, indices, L)
    old = {name: before[name].double() for name in ("sums", "counts", "codes")}
    expected = ema_update_ref(**old, batch_sums=sums, batch_counts=counts, decay=0.8)
    # sums of up to N values below 1; a code of a chosen row divides by 1 or more
    for value, wanted in zip((book.codes, book.sums, book.counts), expected, strict=True):
        close(value, wanted, rounding(dtype, N + 12, N))
    assert torch.equal(book.usage[0], counts.long())
    assert torch.equal(book.ages[0], (counts == 0).long())
    assert book.steps == 1


@pytest.mark.parametrize("shape", [(D,), (3, D), (2, 3, D), (0, D)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_search_takes_any_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    book = EMACodebook(D, L)
    indices = book.search(uniform(*shape, dtype=dtype))
    assert indices.shape == shape[:-1]
    assert torch.equal(book.search(book.codes), torch.arange(L))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (5, 2)], ids=str)
def test_accumulate_takes_any_shape(shape: tuple[int, ...]) -> None:
    book = EMACodebook(D, L)
    flat = deepcopy(book)
    x = uniform(*shape, D, dtype=torch.float32)
    step(book, x)
    step(flat, x.reshape(-1, D))
    assert same(state(book), state(flat))


def test_apply_without_a_function_is_a_step_and_with_one_that_of_a_module() -> None:
    """`apply(fn)` visits modules, wherever the codebook sits, and takes no step."""
    book = EMACodebook(D, L)
    holder, seen = nn.Sequential(nn.Linear(2, 2), book), list[nn.Module]()
    book.accumulate(uniform(N, D, dtype=torch.float32), torch.zeros(N, dtype=torch.long))
    before = state(book)
    assert holder.apply(seen.append) is holder
    assert seen == [holder[0], book, holder]
    assert book.apply(seen.append) is book
    assert seen[-1] is book
    assert same(state(book), before)
    assert book.apply() is book
    assert book.steps == 1


def test_left_out_rows_and_silent_groups() -> None:
    """A group outside update_from is counted in usage and ages, and adds nothing to the codes."""
    x, groups = uniform(N, D), torch.arange(N) % 2
    both = EMACodebook(D, L, groups=2, update_from=[1]).double()
    one = EMACodebook(D, L, groups=2, update_from=[1]).double()
    one.load_state_dict(both.state_dict())
    indices = both.search(x)
    both.accumulate(x, indices, groups)
    one.accumulate(x, torch.where(groups == 1, indices, -1), groups)
    both.apply()
    one.apply()
    assert torch.equal(both.codes, one.codes)
    assert torch.equal(both.counts, one.counts)
    assert both.usage.sum(1).tolist() == [N / 2, N / 2]
    assert one.usage.sum(1).tolist() == [0, N / 2]
    assert (one.ages[0] == UNSEEN).all()
    assert (both.ages[0] >= 0).all()
    both.reset_usage()
    assert (both.usage == 0).all()


@pytest.mark.parametrize("init", ["kmeans", "samples"])
@pytest.mark.parametrize("rows", [3, L, N])
def test_first_codes_from_data(init: Init, rows: int) -> None:
    book = EMACodebook(D, L, init=init, groups=2, update_from=[1])
    x = 5 + uniform(2 * rows, D, dtype=torch.float32)
    groups, usable = torch.arange(2 * rows) % 2, torch.ones(2 * rows, dtype=torch.bool)
    before = state(book)
    book.initialize(x, groups, ~usable)
    assert same(state(book), before)
    assert not book.initialized
    book.initialize(x, groups, usable)
    draw = kmeans if init == "kmeans" else sample_rows
    assert torch.equal(book.codes, draw(x[1::2], L))
    assert torch.equal(book.sums, book.codes)
    assert torch.equal(book.counts, torch.ones(L))
    assert book.initialized
    after = state(book)
    book.initialize(x + 1, groups, usable)  # once
    assert same(state(book), after)


@pytest.mark.parametrize("shape", [(), (7,), (2, 0, 3), (5, 2)], ids=str)
def test_first_codes_take_any_shape(shape: tuple[int, ...]) -> None:
    book, flat = EMACodebook(D, L, init="samples"), EMACodebook(D, L, init="samples")
    flat.load_state_dict(book.state_dict())
    x, usable = uniform(*shape, D, dtype=torch.float32), bools(*shape)
    book.initialize(x, usable=usable)
    flat.initialize(x.reshape(-1, D), usable=usable.flatten())
    assert same(state(book), state(flat))


def test_uniform_codes_are_never_replaced() -> None:
    book = EMACodebook(D, L)
    x = uniform(N, D, dtype=torch.float32)
    for state_of in (book, EMACodebook(D, L, init="kmeans")):  # of the other, not yet replaced
        book.load_state_dict(state_of.state_dict())
        before = state(book)
        book.initialize(x)
        assert same(state(book), before)
        assert book.initialized  # or a k-means codebook that loads these would replace them


def test_one_all_reduce_for_many_codebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    reduced: list[int] = []
    monkeypatch.setattr("mmvq.codebook.all_reduce_", lambda flat, group: reduced.append(len(flat)))
    books = [EMACodebook(D, size, groups=2) for size in (2, 3, 5)]
    shared = nn.ModuleList([books[0], books[1]])
    twins = deepcopy(books)
    x = uniform(N, D, dtype=torch.float32)
    for book in books + twins:
        book.accumulate(x, book.search(x))
    update_codebooks([shared, books[0], books[2]])
    assert reduced == [(2 + D) * (2 + 3 + 5)]
    for book, twin in zip(books, twins, strict=True):
        twin.apply()
        assert same(state(book), state(twin))
    reduced.clear()
    update_codebooks(books[0])  # one module alone; nothing waits
    assert reduced == []


def test_takes_what_search_takes_and_leaves_out_what_is_not_finite() -> None:
    x = torch.randn(3, 5, D)
    x[1, 2, 0] = torch.nan
    x[2, 0, 1] = torch.inf
    spoilt, clean = EMACodebook(D, L), EMACodebook(D, L)
    clean.load_state_dict(spoilt.state_dict())
    indices = spoilt.search(x)
    spoilt.accumulate(x, indices)
    finite = x.isfinite().all(-1)
    clean.accumulate(x[finite], indices[finite])
    for book in (spoilt, clean):
        book.apply()
        assert book.weight.isfinite().all()
    assert torch.equal(spoilt.weight, clean.weight)
