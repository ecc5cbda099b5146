"""Casts, also behind the module's back, and files: the state stays in its dtypes, to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantizers import FLOATS, NAMES, D, L, batch, book_of, dtypes, kinds, trained
from support import close, rounding, same, state, uniform
from torch import nn

from mmvq import (
    EMACodebook,
    MultiModalEMAQuantizer,
)

CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half()": lambda m: m.half(),
    "bfloat16()": lambda m: m.bfloat16(),
    "to(float16)": lambda m: m.to(torch.float16),
    "to('cpu', bfloat16)": lambda m: m.to("cpu", torch.bfloat16),
    "to(tensor)": lambda m: m.to(torch.zeros(1, dtype=torch.bfloat16)),
    "type(float16)": lambda m: m.type(torch.float16),
    "type(bfloat16)": lambda m: m.type(torch.bfloat16),
    "type(int32)": lambda m: m.type(torch.int32),
    "type(bool)": lambda m: m.type(torch.bool),
    "float()": lambda m: m.float(),
    "type(float32)": lambda m: m.type(torch.float32),
    "double()": lambda m: m.double(),
    "type(float64)": lambda m: m.type(torch.float64),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_keep_the_kinds_and_every_bit(cast: str) -> None:
    """The statistics that wait are cast along."""
    quantizer, other = trained(update="manual"), trained(update="manual")
    before = state(quantizer)  # two batches wait for their update
    assert CASTS[cast](quantizer) is quantizer
    wide = torch.float64 if cast in ("double()", "type(float64)") else torch.float32
    assert dtypes(quantizer) == kinds(wide)
    assert all(torch.equal(x, before[n].to(x)) for n, x in state(quantizer).items())
    for each in (quantizer, other):
        each.update_codebook()
        each(batch(seed=1))
        each.update_codebook()
    assert int(book_of(quantizer).steps) == 2
    atol = rounding(torch.float32, 3 * 3 * 15, 4.0)  # sums of 3 * 15 rows of each batch
    for name, x in other.state_dict().items():
        close(quantizer.state_dict()[name], x, atol)


def test_integers_beyond_float_survive_a_cast() -> None:
    """float16 ends at 65504."""
    book = EMACodebook(D, L)
    book.usage.fill_(2**40 + 1)
    book.steps.fill_(2**53 + 1)
    book.type(torch.float16).half().double()
    assert (book.usage == 2**40 + 1).all()
    assert int(book.steps) == 2**53 + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "use",
    ["forward", "encode", "decode", "codebook", "state_dict", "to", "copy", "apply", "set_codes"],
)
def test_a_cast_behind_the_modules_back_costs_no_bit(use: str, dtype: torch.dtype) -> None:
    """FSDP assigns `.data`."""
    quantizer = trained()
    other = trained()
    if use == "apply":  # what was accumulated before the cast
        for each in (quantizer, other):
            book_of(each).accumulate(batch()["audio"], each.encode(batch()["audio"]))
    book, before = book_of(quantizer), state(quantizer)
    pointers = {name: getattr(book, name).data_ptr() for name in FLOATS}
    for name in FLOATS:
        x = getattr(book, name)
        x.data = x.to(dtype)
    result: Any
    if use == "forward":
        result = [quantizer(batch()).loss], [other(batch()).loss]
    elif use == "encode":
        result = [quantizer.encode(batch()["audio"])], [other.encode(batch()["audio"])]
    elif use == "decode":
        result = [quantizer.decode(torch.arange(L))], [other.decode(torch.arange(L))]
    elif use == "codebook":
        result = [quantizer.codebook], [other.codebook]
    elif use == "state_dict":
        result = [*quantizer.state_dict().values()], [*before.values()]
    elif use == "apply":
        result = [book.apply().weight], [book_of(other).apply().weight]
    elif use == "set_codes":
        codes = uniform(L, D, dtype=torch.float32)
        quantizer.set_codes(codes), other.set_codes(codes)
        result = [quantizer.codebook], [codes]
    elif use == "to":
        result = [*quantizer.to("cpu").buffers()], [*before.values()]
    else:
        quantizer = copy.deepcopy(quantizer)
        result = [quantizer.codebook], [other.codebook]
    for ours, theirs in zip(*result, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    if use != "copy":
        assert {name: getattr(book, name).data_ptr() for name in FLOATS} == pointers
    quantizer.state_dict()  # a use of all
    assert dtypes(quantizer) == kinds(torch.float32)
    assert same(state(quantizer), state(other))


def test_what_is_written_while_narrow_is_kept() -> None:
    """Not the state from before the cast."""
    book = book_of(trained())
    for name in FLOATS:
        x = getattr(book, name)
        x.data = x.bfloat16()
        x.copy_(x + 1)
    written = {name: getattr(book, name).clone() for name in FLOATS}
    book.search(torch.zeros(1, D))
    for name, x in written.items():
        assert getattr(book, name).dtype == torch.float32
        assert torch.equal(getattr(book, name), x.float())


@pytest.mark.parametrize("narrow", [False, True])
def test_loading_after_a_cast_behind_the_modules_back(narrow: bool) -> None:
    source, target = trained(), MultiModalEMAQuantizer(D, L, NAMES)
    if narrow:
        for name in FLOATS:
            x = getattr(book_of(target), name)
            x.data = x.bfloat16()
    target.load_state_dict(source.state_dict())
    assert same(state(target), state(source))


# Files


def test_loading_copies_into_the_buffers_that_exist() -> None:
    source, target = trained(), trained(init="samples")
    before = {name: x.data_ptr() for name, x in target.named_buffers()}
    held = {name: x for name, x in target.named_buffers()}
    target.load_state_dict(source.state_dict())
    assert {name: x.data_ptr() for name, x in target.named_buffers()} == before
    assert all(held[name] is x for name, x in target.named_buffers())
    assert same(state(target), state(source))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_loading_another_dtype(dtype: torch.dtype) -> None:
    """float64 widens; half precision is read into float32."""
    source = trained()
    file = {n: x.to(dtype) if x.is_floating_point() else x for n, x in state(source).items()}
    target = MultiModalEMAQuantizer(D, L, NAMES)
    before = book_of(target).codes.data_ptr()
    target.load_state_dict(file)
    wide = torch.promote_types(dtype, torch.float32)
    assert dtypes(target) == kinds(wide)
    assert (book_of(target).codes.data_ptr() == before) == (wide == torch.float32)
    assert all(torch.equal(x, file[n].to(x)) for n, x in state(target).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("built", ["cpu", "meta"])
def test_assign_takes_the_tensors_of_the_file(built: str, dtype: torch.dtype) -> None:
    source = trained()
    file = {n: x.to(dtype) if x.is_floating_point() else x for n, x in state(source).items()}
    file["ema_codebook.initialized"] = file["ema_codebook.initialized"].bool()  # an older file
    with torch.device(built):
        target = MultiModalEMAQuantizer(D, L, NAMES)
    target.load_state_dict(file, assign=True)
    wide = torch.promote_types(dtype, torch.float32)
    assert dtypes(target) == kinds(wide)
    for name, x in target.named_buffers():
        assert torch.equal(x, file[name].to(x))
        assert (x.data_ptr() == file[name].data_ptr()) == (x.dtype == file[name].dtype)
    target(batch())
    assert int(book_of(target).steps) == 3


def test_other_names_are_refused(tmp_path: Path) -> None:
    """The rows of ages and usage belong to names; their order does not matter."""
    pytest.importorskip("huggingface_hub")
    source = trained()
    source.save_pretrained(tmp_path)
    turned = MultiModalEMAQuantizer.from_pretrained(tmp_path, modalities=NAMES[::-1])
    assert turned.modalities == NAMES[::-1]
    assert same(state(turned), state(source))
    assert all(
        torch.equal(turned.usage().counts[name], source.usage().counts[name]) for name in NAMES
    )
    for names in (("video", "audio", "words"), ("video", "audio")):
        with pytest.raises(ValueError, match="modalities") as error:
            MultiModalEMAQuantizer.from_pretrained(tmp_path, modalities=names)
        assert "text" in str(error.value)
