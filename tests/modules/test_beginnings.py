"""How a codebook begins, from given codes or at random, and how it grows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from quantizers import NAMES, D, L, Tensors, batch, some_masks, trained
from support import close, rounding, same, state, uniform
from torch import Tensor

from mmvq import EMACodebook, MultiModalEMAQuantizer
from mmvq.functional import UNSEEN, code_statistics_ref, ema_update_ref, laplace_smoothing

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
KINDS = pytest.mark.parametrize("kind", ["codebook", "quantizer"])


def module(kind: str, **options: Any) -> Any:
    return EMACodebook(D, L, **options) if kind == "codebook" else trained(**options)


def book_of(module: Any) -> EMACodebook:
    book: EMACodebook = getattr(module, "ema_codebook", module)
    return book


@KINDS
@DTYPES
@pytest.mark.parametrize("counted", [True, False])
def test_given_codes_are_the_codes(kind: str, dtype: torch.dtype, counted: bool) -> None:
    book = book_of(given := module(kind))
    codes, counts = uniform(L, D, dtype=dtype, seed=1), (9 * uniform(L, seed=2).abs()).to(dtype)
    counts[3] = 0
    where = {name: x.data_ptr() for name, x in book.named_buffers()}
    given.set_codes(codes, counts if counted else None)
    if dtype != torch.float64:  # which widens the state
        assert where == {name: x.data_ptr() for name, x in book.named_buffers()}
    assert book.codes.dtype == book.counts.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(book.codes, codes.to(book.codes))
    assert torch.equal(book.counts, counts.to(book.counts) if counted else torch.ones_like(counts))
    smoothed = laplace_smoothing(book.counts, book.eps)[:, None]
    close(book.sums, book.codes * smoothed, rounding(book.sums.dtype, 4, 9))
    assert book.initialized == 1
    assert not any(x.any() for x in (book.usage, book.steps))
    assert (book.ages == UNSEEN).all()


@KINDS
def test_given_codes_are_where_training_goes_on_from(kind: str) -> None:
    """The first batch moves what it chooses by Eq. 7, and no data draws the codes anew."""
    book = book_of(given := module(kind, init="kmeans", decay=0.8))
    x = uniform(40, D, seed=3)
    book.accumulate(x, book.search(x))  # forgotten
    codes = uniform(L, D, seed=1)
    given.set_codes(codes)
    book.initialize(x)
    assert torch.equal(book.codes, codes)
    index = book.search(x)
    book.accumulate(x, index)
    book.apply()
    counts, sums = code_statistics_ref(x, index, L)
    wanted = ema_update_ref(codes, torch.ones(L).double(), sums, counts, decay=0.8, codes=codes)
    for value, expected in zip((book.codes, book.sums, book.counts), wanted, strict=True):
        close(value, expected, rounding(torch.float64, 60, 40))


def test_given_codes_survive_a_schedule_of_resets() -> None:
    """A modality that never comes does not age them, and so does not reset them."""
    quantizer = MultiModalEMAQuantizer(D, L, NAMES, reset_after=2, partner="none", decay=1.0)
    codes = 10 * torch.eye(L, D) - 10 * torch.eye(L, D).roll(4, 0)
    quantizer.set_codes(codes)
    for _ in range(6):
        quantizer({"audio": codes[None], "video": codes[None]})
    close(quantizer.codebook, codes, 0.0)


def test_given_codes_do_not_make_an_absent_modality_vote() -> None:
    """By the rule "any", one that was never seen keeps no code alive: all come into use."""
    quantizer = MultiModalEMAQuantizer(D, L, NAMES, reset_after=3, reset_rule="any", partner="none")
    far = uniform(L, D, dtype=torch.float32)
    far[2:] += 100
    quantizer.set_codes(far)
    for seed in range(20):
        quantizer({"audio": batch(seed=seed)["audio"]})
    assert not quantizer.usage().dead.any()
    assert (quantizer.codebook.abs() < 2).all()


def test_codes_without_any_count_and_without_smoothing() -> None:
    book = EMACodebook(D, L, eps=0.0)
    codes = uniform(L, D, dtype=torch.float32)
    book.set_codes(codes, torch.zeros(L))
    x = uniform(40, D, dtype=torch.float32, seed=1)
    book.accumulate(x, index := book.search(x))
    book.apply()
    assert book.weight.isfinite().all()
    assert torch.equal((book.weight != codes).any(1), torch.bincount(index, minlength=L) > 0)


def clusters(number: int, rows: int, spread: float = 0.01) -> Tensor:
    """Rows around far centres, `[rows, 16]`."""
    centres = 10 * uniform(number, 16, seed=5)
    return (centres[torch.arange(rows) % number] + spread * uniform(rows, 16, seed=6)).float()


def error(quantizer: MultiModalEMAQuantizer, x: Tensor) -> float:
    return float((x - quantizer.decode(quantizer.encode(x))).square().mean())


@pytest.mark.parametrize("init", ["kmeans", "uniform"])
def test_a_codebook_as_large_as_the_data_is_varied_gets_it_exactly(init: Any) -> None:
    """64 tight clusters, 64 codes. From data at once; from random codes by resets, which split."""
    x = clusters(64, 1280)
    quantizer = MultiModalEMAQuantizer(16, 64, ("audio",), init=init, reset_after=3, decay=0.5)
    for _ in range(1 if init == "kmeans" else 60):
        quantizer({"audio": x[None]})
    within = 0.01**2 / 3  # the variance of the noise
    assert error(quantizer, x) < 2 * within


def test_random_codes_are_forgotten_at_once() -> None:
    """N starts at 0: a code is the mean of what chose it, from the first batch on."""
    book = EMACodebook(D, L)
    x = uniform(40, D, dtype=torch.float32)
    index = book.search(x)
    before = state(book)["codes"]
    book.accumulate(x, index)
    book.apply()
    for code in range(L):
        rows = x[index == code]
        wanted = rows.mean(0) if len(rows) else before[code]
        # smoothing takes eps of a count of 0.01 or more: 1e-3
        close(book.codes[code], wanted, 1.1e-3 + rounding(torch.float32, 50))


def test_a_code_that_nothing_chooses_stays() -> None:
    """Norm 40 for 1,400 batches; the smoothing would shrink it once its N is below eps."""
    book = EMACodebook(2, 2)
    book.set_codes(torch.tensor([[1.0, 0.0], [40.0, 0.0]]))
    x = torch.tensor([[1.0, 0.0]])
    for _ in range(1400):
        book.accumulate(x, book.search(x))
        book.apply()
    assert book.codes[1].tolist() == [40.0, 0.0]
    assert book.counts[1] < 1e-5


def rows_of(quantizer: MultiModalEMAQuantizer) -> dict[str, Tensor]:
    """Ages and usage by modality."""
    book = quantizer.ema_codebook
    names = sorted(quantizer.modalities)
    return {
        f"{kind} {name}": row
        for kind, rows in (("ages", book.ages), ("usage", book.usage))
        for name, row in zip(names, rows, strict=True)
    }


def part(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Tensors:
    """The first entries, as many as the others have."""
    return {name: tensors[name][: len(x)] if x.ndim else tensors[name] for name, x in like.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [None, L, L + 1, 3 * L + 2])
@pytest.mark.parametrize("added", [(), ("depth",), ("zebra", "aaa")])
def test_extended_keeps_every_bit_that_it_had(
    dtype: torch.dtype, size: int | None, added: tuple[str, ...]
) -> None:
    old = trained(reset_after=4, partner="aligned", update_from=("audio", "text")).to(dtype)
    old(batch(dtype))
    before = state(old)
    names = (*added, *NAMES)
    new = old.extended(modalities=names if added else None, codebook_size=size)
    assert same(state(old), before)
    assert type(new) is type(old)
    assert new.modalities == names
    assert new.codebook_size == (size or L)
    assert new.training
    assert (new.reset_after, new.partner, new.update_from) == (4, "aligned", ("audio", "text"))
    mine, theirs = new.ema_codebook, old.ema_codebook
    for name in ("codes", "sums", "counts"):
        assert torch.equal(getattr(mine, name)[:L], getattr(theirs, name))
    assert same(part(rows_of(new), rows_of(old)), rows_of(old))
    assert mine.steps == theirs.steps
    for name in added:
        assert (rows_of(new)[f"ages {name}"] == UNSEEN).all()
        assert not rows_of(new)[f"usage {name}"].any()
    assert mine.codes.isfinite().all()
    assert mine.codes.unique(dim=0).shape[0] == theirs.codes.unique(dim=0).shape[0] + (
        (size or L) - L
    )
    z = batch(dtype, seed=4, names=names)
    new(z)
    assert all(new.usage().counts[name].sum() > 0 for name in names)


def test_extended_by_nothing_goes_on_to_the_bit() -> None:
    old = trained(reset_after=1)
    new = old.extended()
    assert new.commitment is not old.commitment
    for seed in range(3):
        old(batch(seed=seed), some_masks())
        new(batch(seed=seed), some_masks())
    assert same(state(old), state(new))


def test_new_codes_split_the_crowded_ones() -> None:
    """16 codes for 32 tight clusters; with 16 more, every cluster soon has its own."""
    x = clusters(32, 640)
    quantizer = MultiModalEMAQuantizer(16, 16, ("audio",), decay=0.5, reset_after=3)
    for _ in range(10):
        quantizer({"audio": x[None]})
    coarse = error(quantizer, x)
    fine = quantizer.extended(codebook_size=32)
    assert error(fine, x) <= coarse
    for _ in range(40):
        fine({"audio": x[None]})
    assert error(fine, x) < 2 * 0.01**2 / 3 < coarse / 100


def test_an_extended_quantizer_that_saw_nothing_begins_with_data() -> None:
    fresh = MultiModalEMAQuantizer(D, L, NAMES).extended(codebook_size=2 * L)
    assert not fresh.ema_codebook.initialized
    fresh(batch())
    assert fresh.ema_codebook.initialized
    assert (fresh.usage().dead).sum() < 2 * L


def test_encoding_with_codes_that_mean_nothing_is_not_silent() -> None:
    quantizer, x = MultiModalEMAQuantizer(D, L, NAMES), torch.randn(3, D)
    with pytest.warns(UserWarning, match=r"encode: the codebook has seen no data yet"):
        quantizer.encode(x)
    quantizer.set_codes(uniform(L, D, dtype=torch.float32))
    quantizer.encode(x)
    MultiModalEMAQuantizer(D, L, NAMES, init="uniform").encode(x)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str
)
def test_tokens_of_any_integer_dtype(dtype: torch.dtype) -> None:
    quantizer = trained()
    tokens = torch.tensor([[0, 7, 3], [2, 5, 1]])
    assert torch.equal(quantizer.decode(tokens.to(dtype)), quantizer.codebook[tokens])
    if dtype != torch.uint8:
        masked = torch.tensor([-1, 2]).to(dtype)
        assert not quantizer.decode(masked)[0].any()


class Taught(MultiModalEMAQuantizer):
    """A subclass with a part of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head = torch.nn.Linear(D, 2)


class Turned(torch.nn.Module):
    """A partner with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = torch.nn.Linear(D, D)

    def forward(self, z: Tensor, others: Tensors, masks: Tensors) -> Tensor:
        out: Tensor = self.turn(z)
        return out


def test_extended_takes_along_parts_with_parameters() -> None:
    old = Taught(D, L, NAMES, partner=Turned())
    old(batch())
    with torch.device("meta"):  # where it is built is where the old one is
        new = old.extended(modalities=(name for name in (*NAMES, "depth")), codebook_size=L + 2)
    assert isinstance(new.partner, Turned)
    assert new.partner is not old.partner
    assert torch.equal(new.partner.turn.weight, old.partner.turn.weight)
    assert torch.equal(new.head.weight, old.head.weight)
    assert new.head is not old.head
    new(batch(names=new.modalities))


def test_what_is_built_in_cannot_be_set() -> None:
    """Rather than do nothing."""
    quantizer = trained()
    for holder in (quantizer, quantizer.ema_codebook):
        with pytest.raises(AttributeError):
            holder.update_from = None  # type: ignore[misc]
    with pytest.raises(AttributeError):
        quantizer.modalities = NAMES  # type: ignore[misc]


def test_where_first_codes_come_from_may_change_until_they_have_come() -> None:
    data, drawn = (MultiModalEMAQuantizer(D, L, NAMES, init=i) for i in ("uniform", "kmeans"))
    data.init, drawn.init = "kmeans", "uniform"
    data(batch())
    drawn(batch())
    assert (data.ema_codebook.counts >= 0.99).all()  # N starts from 1 where codes are from data
    assert (drawn.ema_codebook.counts < 0.99).all()
    for quantizer in (data, drawn):
        trained, quantizer.init = quantizer.codebook, "samples"
        assert torch.equal(quantizer.extended().codebook, trained)
        quantizer(batch(seed=1))
        assert quantizer.ema_codebook.steps == 2
