"""What a codebook keeps: its buffers, through casts, copies and files."""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from quantizers import NAMES, B, D, L, T, batch, some_masks, trained
from support import same, state, uniform, wide
from torch import Tensor, nn

from mmvq import CLUBEstimator, CrossCPC, EMACodebook, MultiModalEMAQuantizer, functional

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
    assert (book.ages == functional.UNSEEN).all()
    assert book.ages.shape == book.usage.shape == (2, L)
    assert not any(p.requires_grad for p in book.parameters())
    assert book.weight is book.codes
    assert repr(book) == (
        "EMACodebook(dim=4, size=8, decay=0.99, eps=1e-05, reset_after=None, "
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


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_casts_never_narrow_the_state(cast: str) -> None:
    book = EMACodebook(D, L)
    x = uniform(N, D, dtype=torch.float32)
    before = state(book)
    book.accumulate(x, book.search(x))
    getattr(book, cast)()
    wanted = torch.float64 if cast == "double" else torch.float32
    assert {y.dtype for y in book.state_dict().values() if y.is_floating_point()} == {wanted}
    assert torch.equal(book.codes.float(), before["codes"])
    book.apply()  # what waited was cast along
    assert book.codes.dtype == wanted
    assert book.steps == 1
    holder = nn.Sequential(nn.Linear(2, 2), book)
    getattr(holder, cast)()
    assert book.codes.dtype == wanted


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cast_module_keeps_a_wide_state(cast: str, when: str) -> None:
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}[cast]
    plain, module = MultiModalEMAQuantizer(D, L, NAMES), MultiModalEMAQuantizer(D, L, NAMES)
    steps = (0, 1, 2)
    for step in steps:
        if (when == "before") == (step == 0):
            getattr(module, cast)()
        z = batch(dtype, seed=step)
        quantized = module(z).quantized
        plain(z)
        assert all(q.dtype == dtype for q in quantized.values())
        assert module.codebook.dtype == wide(dtype)
    assert same(state(module), state(plain))  # a cast changes nothing but the outputs


def test_float64_data_makes_a_float64_state() -> None:
    book = EMACodebook(D, L, init="samples")
    x = uniform(N, D)
    book.initialize(x)
    assert book.codes.dtype == book.counts.dtype == torch.float64
    assert torch.equal(book.codes, functional.sample_rows(x, L))


def test_float64_values_make_the_state_float64() -> None:
    book = EMACodebook(D, L)
    x = torch.randn(7, D, dtype=torch.float64)
    book.accumulate(x, book.search(x))
    book.apply()
    assert book.weight.dtype == book.counts.dtype == torch.float64


def test_one_wide_modality_makes_the_state_wide() -> None:
    quantizer = MultiModalEMAQuantizer(D, L, NAMES)
    quantizer({"audio": uniform(B, T, D), "video": uniform(B, T, D, dtype=torch.float64)})
    assert quantizer.codebook.dtype == torch.float64


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_file_in_half_precision_makes_a_wide_state(dtype: torch.dtype, assign: bool) -> None:
    saved = state(EMACodebook(D, L))
    saved |= {name: x.to(dtype) for name, x in saved.items() if x.is_floating_point()}
    book = EMACodebook(D, L)
    book.load_state_dict(saved, assign=assign)
    for name, x in state(book).items():
        assert x.dtype == (torch.float32 if x.is_floating_point() else saved[name].dtype)
        assert torch.equal(x, saved[name].to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_loaded_state_goes_on_to_the_bit(dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"init": "kmeans", "reset_after": 2}
    book, other = EMACodebook(D, L, **options), EMACodebook(D, L, **options)
    first, second = (uniform(N, D, dtype=dtype, seed=i) for i in range(2))
    book.initialize(first)
    step(book, first)
    other.load_state_dict(book.state_dict())
    twin = deepcopy(book)
    for each in (book, other, twin):
        each.initialize(second)  # too late: the codes hold data
        step(each, second)
    assert same(state(book), state(other))
    assert same(state(book), state(twin))
    assert book.codes.data_ptr() != twin.codes.data_ptr()


@pytest.mark.parametrize(
    "options", [{}, {"partner": "aligned", "reset_after": 1}, {"init": "samples"}]
)
def test_saved_loaded_and_copied_go_on_to_the_bit(options: dict[str, Any], tmp_path: Any) -> None:
    quantizer = trained(**options)
    torch.save(quantizer.state_dict(), tmp_path / "state.pt")
    loaded, copied = MultiModalEMAQuantizer(D, L, NAMES, **options), deepcopy(quantizer)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for seed in range(3):
        outs = [module(batch(seed=seed), some_masks()) for module in (quantizer, loaded, copied)]
        assert all(torch.equal(outs[0].loss, out.loss) for out in outs)
    assert same(state(quantizer), state(loaded))
    assert same(state(quantizer), state(copied))


@pytest.mark.parametrize("partner", ["attention", "aligned", "none"])
def test_pickles_and_copies(partner: Any) -> None:
    quantizer = trained(partner=partner)
    again = pickle.loads(pickle.dumps(quantizer))
    assert same(state(again), state(quantizer))
    assert torch.equal(again(batch()).loss, quantizer(batch()).loss)


def test_names_in_another_order_share_checkpoints() -> None:
    quantizer = trained()
    other = MultiModalEMAQuantizer(D, L, tuple(reversed(NAMES)))
    other.load_state_dict(quantizer.state_dict())
    quantizer(batch())
    other(dict(reversed(batch().items())))
    assert same(state(quantizer), state(other))
    assert list(other.usage().counts) == list(reversed(NAMES))


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


@pytest.mark.parametrize(
    "make", [codebook, lambda: CrossCPC(D, NAMES), lambda: CLUBEstimator(D, D)]
)
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
