"""What a codebook keeps: its buffers, through casts, copies and files."""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from parts import MODULES
from quantizers import NAMES, B, D, L, T, batch, trained
from support import same, state, uniform
from torch import Tensor

from mmvq import EMACodebook, MultiModalEMAQuantizer
from mmvq.functional import UNSEEN, sample_rows

N = 40


def step(book: EMACodebook, x: Tensor, groups: Tensor | None = None) -> None:
    book.accumulate(x, book.search(x), groups)
    book.apply()


def test_starts_small_and_with_no_vector_in_any_code() -> None:
    book = EMACodebook(D, L, groups=2)
    assert book.codes.shape == (L, D)
    assert (book.codes.abs() <= 1 / L).all()
    assert not book.sums.any()
    assert not book.counts.any()
    assert (book.ages == UNSEEN).all()
    assert book.ages.shape == book.usage.shape == (2, L)
    assert not any(p.requires_grad for p in book.parameters())
    assert book.weight is book.codes
    assert repr(book) == (
        "EMACodebook(dim=4, codebook_size=8, decay=0.99, eps=1e-05, reset_after=None, "
        "reset_rule='all', init='uniform')"
    )


def test_state_names_and_settings() -> None:
    quantizer = MultiModalEMAQuantizer(D, L)
    fields = ("codes", "sums", "counts", "ages", "usage", "steps", "initialized")
    assert list(quantizer.state_dict()) == [f"ema_codebook.{name}" for name in fields]
    assert list(quantizer.parameters()) == []
    assert quantizer.modalities == ("audio", "video")
    assert quantizer.ema_codebook.process_group is None
    assert "partner='attention', partner_weight=0.5" in repr(quantizer)


@pytest.mark.parametrize("by", ["initialize", "accumulate", "one modality"])
def test_float64_data_makes_a_float64_state(by: str) -> None:
    if by == "one modality":
        quantizer, x = MultiModalEMAQuantizer(D, L, NAMES), uniform(B, T, D)
        quantizer({"audio": x, "video": x.float()})
        book = quantizer.ema_codebook
    else:
        book, x = EMACodebook(D, L, init="samples"), uniform(N, D)
        if by == "initialize":
            book.initialize(x)
            assert torch.equal(book.codes, sample_rows(x, L))
        else:
            step(book, x)
    assert book.codes.dtype == book.sums.dtype == book.counts.dtype == torch.float64


def test_narrow_data_is_added_in_the_dtype_of_the_state() -> None:
    book, x = EMACodebook(D, L).double(), uniform(N, D, dtype=torch.float32)
    twin = deepcopy(book)
    step(book, x)
    step(twin, x.double())
    assert same(state(book), state(twin))


def test_a_pickle_goes_on_to_the_bit() -> None:
    quantizer = trained()
    again = pickle.loads(pickle.dumps(quantizer))
    assert torch.equal(again(batch()).loss, quantizer(batch()).loss)
    assert same(state(again), state(quantizer))


@pytest.mark.parametrize("assign", [False, True])
def test_a_codebook_built_without_data_is_that_of_the_state_it_loads(assign: bool) -> None:
    saved = EMACodebook(D, L, groups=3, update_from=(2,))
    with torch.device("meta"):
        book = EMACodebook(D, L, groups=3, update_from=(2,))
    if not assign:
        book.to_empty(device="cpu")
    book.load_state_dict(deepcopy(saved.state_dict()), assign=assign)
    x = uniform(N, D, dtype=torch.float32)
    for each in (book, saved):
        step(each, x, torch.arange(N) % 3)
    assert same(state(book), state(saved))


def codebook() -> EMACodebook:
    return EMACodebook(D, L, groups=3, update_from=(2,), init="samples")


def test_started_anew_it_is_as_built() -> None:
    book = codebook()
    torch.manual_seed(0)
    expected = state(codebook())
    x = uniform(N, D, dtype=torch.float32)
    book.initialize(x, torch.full((N,), 2))
    step(book, x)
    book.accumulate(x, book.search(x))
    torch.manual_seed(0)
    book.reset_parameters()
    assert same(state(book), expected)
    book.apply()  # nothing waits
    assert same(state(book), expected)
    book.initialize(x, torch.full((N,), 2))
    assert book.initialized


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_a_module_built_without_memory_starts_as_any_other(make: Any) -> None:
    """As large models are built for FSDP: on `meta`, then `to_empty`, then `reset_parameters`."""
    with torch.device("meta"):
        module = make()
    module.to_empty(device="cpu")
    for x in (*module.parameters(), *module.buffers()):
        x.detach().fill_(7)  # whatever lay there
    torch.manual_seed(0)
    module.apply(lambda part: getattr(part, "reset_parameters", int)())
    torch.manual_seed(0)
    expected = make()
    assert same(dict(module.named_buffers()), dict(expected.named_buffers()))
    assert same(state(module), state(expected))


def test_loading_a_state_forgets_what_was_accumulated_for_another() -> None:
    quantizer = trained(update="manual")
    saved = state(quantizer)
    quantizer(batch(seed=5))
    quantizer.load_state_dict(saved)
    quantizer.update_codebook()
    assert same(state(quantizer), saved)
